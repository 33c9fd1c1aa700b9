"""Pairs of sources and targets: what is stored of them, and what encoder-decoders leave dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from fsdp_qlora.config.schema import QuantSettings, from_dict
from fsdp_qlora.data.encoder import Stored
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.pairs import PairEncoder, Side
from fsdp_qlora.errors import ConfigError, ModelError, PlanError
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.objectives import Objective, build_objective, register
from fsdp_qlora.plan.quantized import chosen_linears
from fsdp_qlora.run.labels import require_metrics
from tests.families import OTHERS
from tests.tiny import make_tokenizer

END = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def _encoder(tokenizer: Any, truncation: str = "right", most: int = 4, positions: int = 0) -> PairEncoder:
    sources, targets = Side(tokenizer, 6, truncation), Side(tokenizer, most, truncation, learned=True, end=END)
    return PairEncoder(lambda row: row.values or {}, tokenizer, sources, targets, 0, "the ", positions)


def _stored(encoder: PairEncoder, **values: Any) -> Any:
    ((_, where, outcome),) = encoder.encode([(0, Row("rows.jsonl:1", values, 1))])
    assert where == "rows.jsonl:1"
    return outcome


def test_a_pair_is_stored_with_the_end_of_its_target_and_the_prefix_of_its_source(tokenizer):
    stored = _stored(_encoder(tokenizer), source="quick fox", target="lazy dog")
    (item,) = stored.items
    assert tokenizer.decode(item["input_ids"]) == "the quick fox"
    assert list(item["labels"]) == [*tokenizer("lazy dog")["input_ids"], END]
    assert item["target"] == "lazy dog" and item["targets"] == len(item["labels"]) == stored.counts.target_tokens
    assert item["length"] == len(item["input_ids"]) + len(item["labels"]) == stored.counts.tokens


@pytest.mark.parametrize(("truncation", "kept"), [("right", slice(0, 3)), ("left", slice(-3, None)), ("drop", None)])
def test_a_longer_target_is_cut_or_dropped_and_counted(tokenizer, truncation, kept):
    target = "lazy dog while seven small ships"
    stored = _stored(_encoder(tokenizer, truncation), source="fox", target=target)
    whole = tokenizer(target)["input_ids"]
    assert len(whole) > 4
    if kept is None:
        assert not stored.items and stored.counts.dropped_long == 1
    else:
        assert list(stored.items[0]["labels"]) == [*whole[kept], END] and stored.counts.truncated == 1
        assert stored.items[0]["target"] == target  # what is written is compared with all of it


@pytest.mark.parametrize(
    ("values", "said"),
    [({"source": "fox"}, "the row has no 'target'"), ({"source": " ", "target": "fox"}, "the source is empty"),
     ({"source": "fox", "target": 3}, "expected text"), ({"source": "fox", "target": "lazy dog"}, "set data.max_length")],
)  # fmt: skip
def test_a_bad_pair_is_said(tokenizer, values, said):
    outcome = _stored(_encoder(tokenizer, positions=2), **values)
    assert not isinstance(outcome, Stored) and said in str(outcome)


def test_what_encoder_decoders_leave_dense_does_not_count_as_unquantized():
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=64, **OTHERS["t5"]))
    shapes = read_shapes(model.to(torch.bfloat16))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in shapes.left_dense} == {"wo"}
    chosen = chosen_linears(QuantSettings(name="nf4"), shapes)
    assert {x.linear.name.rpartition(".")[2] for x in chosen} == {"q", "k", "v", "o", "wi"}
    with pytest.raises(PlanError, match=r"wo\.weight"):  # without upstream's word for it, they would
        chosen_linears(QuantSettings(name="nf4"), replace(shapes, left_dense=frozenset()))


def test_a_causal_model_is_refused():
    objective = build_objective("seq2seq")
    with pytest.raises(ModelError, match="a llama is not an encoder-decoder"):
        objective.configure(AutoConfig.for_model("llama"))


def test_metrics_that_cannot_be_computed_are_refused_before_anything_is_loaded(tmp_path: Path):
    @register
    class Lacking(Objective):
        """An objective whose metrics nobody has."""

        name = "lacking"
        packages = ("no_such_package_of_metrics",)  # type: ignore[assignment]

        def sums(self, model: Any, micro_batch: Any) -> Any:
            raise NotImplementedError

    config = {"model": {"name": "x"}, "objective": {"name": "lacking"}, "data": {"train": "rows", "eval_fraction": 0.1}}
    with pytest.raises(ConfigError, match=r"no_such_package_of_metrics\): pip install 'fsdp-qlora\[tasks\]'"):
        require_metrics(from_dict(config))
    require_metrics(from_dict({**config, "data": {"train": "rows"}}))
