"""Rows straight from their sources: the order, the shares, the resume, what is passed over."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import DataSettings, from_dict
from fsdp_qlora.data.ahead import Ahead
from fsdp_qlora.data.loader import Batch, Cut
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.data.stream import StreamLoader
from fsdp_qlora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 30), ("b", 7)):
        rows = [{"prompt": f"{name}{n:02d}", "completion": "xyz" * (1 + n % 3)} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def _stream(tmp_path, tokenizer, train, **settings):
    data = DataSettings(train=train, streaming=True, max_length=64, **{"shuffle_window": 10, **settings})
    prepared = prepare_data(data, 3, tokenizer, tmp_path / "cache")
    assert prepared.stream is not None
    return prepared.stream


def _loader(stream, size=4, rank=0, num_ranks=1, passed=None):
    note = lambda where, problem: (passed if passed is not None else []).append((where, str(problem)))  # noqa: E731
    return StreamLoader(stream, size, Cut(2, rank, num_ranks), lambda rows: rows, note)


def _texts(batch: Batch, tokenizer):
    rows = [ids for m in batch.micro_batches if m.weight for ids in m.input_ids]
    return sorted(tokenizer.decode(ids)[:3] for ids in rows)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_each_row_once_a_pass_and_the_same_batches_on_any_world(tmp_path, tokenizer, files, num_ranks):
    stream = _stream(tmp_path, tokenizer, files[0])
    one = _loader(stream, size=5)
    ranks = [_loader(stream, 5, rank, num_ranks) for rank in range(num_ranks)]
    seen = []
    for position in range(0, 60, 5):
        parts = [loader.batch_at(position) for loader in ranks]
        texts = sorted(text for part in parts for text in _texts(part, tokenizer))
        assert texts == _texts(one.batch_at(position), tokenizer)
        assert len({(p.num_rows, p.num_tokens, p.weights["tokens"], len(p.micro_batches)) for p in parts}) == 1
        seen += texts
    assert Counter(seen[:30]) == Counter(seen[30:]) == Counter({f"a{n:02d}": 1 for n in range(30)})
    assert seen[:30] != sorted(seen[:30])


@pytest.mark.parametrize("position", [0, 4, 8, 20, 36, 100])
def test_a_resume_at_any_position_goes_on_where_it_was(tmp_path, tokenizer, files, position):
    stream = _stream(tmp_path, tokenizer, files)
    whole, late = _loader(stream), _loader(stream)
    before = [whole.rows_at(p) for p in range(0, position + 8, 4)]
    assert [late.rows_at(p) for p in range(position, position + 8, 4)] == before[-2:]
    assert late.rows_at(0) == before[0]  # back again, as after a rollback


def test_what_decides_the_order_decides_the_key_that_a_resume_compares(tmp_path, tokenizer, files):
    def key(**settings):
        data = DataSettings(train=files, streaming=True, **settings)
        return prepare_data(data, 3, tokenizer, tmp_path / "cache").key

    assert key() == key()
    others = [key(shuffle_window=10), key(weights=[0.5, 0.5]), key(max_length=8)]
    assert len({key(), *others}) == 4


def test_shares_are_exact_to_one_row_at_any_position(tmp_path, tokenizer, files):
    stream = _stream(tmp_path, tokenizer, files, weights=[0.75, 0.25])
    rows = stream.rows()
    taken = [0, 0]
    for count in range(1, 201):
        taken[next(rows)[0]] += 1
        assert abs(taken[0] - 0.75 * count) < 1


def test_bad_rows_are_named_or_passed_over(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    file.write_text("\n".join([good, "{broken", good, good]))
    stream = _stream(tmp_path, tokenizer, str(file), shuffle_window=4)
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        _loader(stream).batch_at(0)
    passed = []
    batch = _loader(replace(stream, skip_bad=True), passed=passed).batch_at(0)
    assert (batch.num_rows, sum(len(m.input_ids) for m in batch.micro_batches)) == (4, 3)
    assert len(passed) == 1 and "line 2" in passed[0][0]
    nothing = _stream(tmp_path, tokenizer, str(file), on_bad_row="skip", truncation="drop", shuffle_window=4)
    with pytest.raises(DataError, match="none of the 4 rows of a global batch"):
        _loader(replace(nothing, fit=replace(nothing.fit, max_length=1))).batch_at(0)


@pytest.mark.parametrize(("settings", "said"), [
    ({}, "data.streaming: a stream's length is unknown"),
    ({"train": {"max_steps": 3}, "data": {"packing": True}}, "data.packing: needs all rows"),
    ({"train": {"max_steps": 3}, "data": {"eval_fraction": 0.1}}, "data.eval_fraction: needs all rows"),
    ({"train": {"max_steps": 3}, "data": {"weights": [1.0, 2.0]}}, "data.weights: 2 numbers for 1 sources"),
])  # fmt: skip
def test_what_a_stream_cannot_do_is_refused(settings, said):
    data = {"train": "a.jsonl", "streaming": True, **settings.get("data", {})}
    assert any(said in text for text in failures(from_dict({**settings, "data": data})))


def test_the_next_batch_is_ready_and_an_error_comes_where_it_belongs():
    asked = []

    def batch_at(position: int) -> Batch:
        asked.append(position)
        if position == 6:
            raise DataError("row 6")
        return Batch([], 2, position, 1)

    ahead = Ahead(batch_at, end=10)
    assert [ahead(p).num_tokens for p in (0, 2, 4)] == [0, 2, 4]
    with pytest.raises(DataError, match="row 6"):
        ahead(6)
    assert ahead(8).num_tokens == 8  # left out and gone on; nothing comes after 8
    assert asked == [0, 2, 4, 6, 8]
    assert ahead(0).num_tokens == 0
    ahead.close()
