"""Labels as files of the field have them: digits without types, vectors of 0 and 1, scores, a model's own order."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fsdp_qlora.config.schema import ObjectiveSettings, from_dict
from fsdp_qlora.data.image_rows import image_rows
from fsdp_qlora.data.lines import Row
from fsdp_qlora.errors import ConfigError, DataError
from fsdp_qlora.objectives.labels import Labels, find_labels
from fsdp_qlora.run.labels import labels_of

SETTINGS = ObjectiveSettings(name="sequence_classification")


def _found(labels, settings=SETTINGS):
    rows = [Row(f"row {number}", {"label": label}) for number, label in enumerate(labels)]
    return find_labels(rows, lambda row: row.values, settings, "label")


def test_digits_are_the_numbers_that_other_files_have():
    """CSV has no types: "10" there is 10 in JSON, and 10 comes after 2."""
    found = _found([str(number) for number in range(12)])
    assert found.labels == [str(number) for number in range(12)]
    labels = Labels(found)
    assert [labels.number("10"), labels.number(10), labels.number(2.0)] == [10, 10, 2]
    three = Labels(replace(SETTINGS, labels=["1", "2", "3"], problem_type="single_label_classification"))
    assert [three.number(one) for one in (1, "1", 3)] == [0, 0, 2]
    with pytest.raises(DataError, match="label 0 is out of range: there are 3 labels, numbered from 1"):
        three.number(0)


def test_scores_without_types_are_numbers_to_predict():
    found = _found(["0.5", "2", "3.25"])
    assert found.problem_type == "regression" and Labels(found).vector("3.25") == [3.25]
    for words in (["0.5 stars", "2"], *([f"{n}.5", "good"] for n in range(9)), ["nan", "0.5"]):  # in any order of a set
        assert _found(words).problem_type == "single_label_classification"
    assert _found(["1", "2"]).problem_type == "single_label_classification"


def test_a_vector_of_zeros_and_ones_is_no_list_of_labels():
    with pytest.raises(DataError, match=r"all rows have the same labels \(0, 1\)"):
        _found([[1, 0, 0], [0, 1, 1]])
    with pytest.raises(DataError, match=r"label \[1, 0, 0\] names one twice. A list holds the names or numbers"):
        Labels(_found([[1, 0, 0], [2]])).vector([1, 0, 0])
    with pytest.raises(DataError, match="all rows have the same labels"):
        _found([[1, 0], [0, 1]])


def test_weights_of_classes_are_of_labels_that_there_are():
    settings = replace(SETTINGS, class_weights={"c": 2.0})
    with pytest.raises(ConfigError, match=r"'c' is no label of data\.train; the labels are 'a', 'b'"):
        _found(["a", "b"], settings)
    for labels in ([["a"], ["c"]], [0.5, 1.5]):
        with pytest.raises(ConfigError, match="only for one label of several"):
            _found(labels, settings)
    assert _found(["a", "c"], settings).class_weights == {"c": 2.0}


@pytest.mark.parametrize(("own", "order"), [(["b", "a"], ["b", "a"]), (["LABEL_0", "LABEL_1"], ["a", "b"])])
def test_a_model_that_has_these_labels_keeps_their_order(tmp_path, own, order):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in "ab"))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(own))}))
    groups = {"model": {"name": str(tmp_path)}, "data": {"train": str(rows)}, "objective": {"name": SETTINGS.name}}
    assert labels_of(from_dict(groups), tmp_path).labels == order


def test_parts_of_a_data_set_are_no_labels(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds test, train, which are parts of a data set and not labels. Set data.t"):
        list(image_rows(str(tmp_path)))
