"""Objectives beside sft: losses are upstream's own, on any number of ranks; runs resume; exports load in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.evaluate import evaluate_prepared
from fsdp_qlora.run.fit import fit
from tests.build import build, essence, losses, metrics, run_fit
from tests.objectives import CASES, exported_outputs, held_and_planned, upstream_losses
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES

FAST = {"bert, pairs and numbers"}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", some_in_full(CASES, FAST))
def test_losses_are_upstreams(pool, tmp_path, kind, num_ranks):
    model, groups = CASES[kind].write(tmp_path)
    ours = losses(pool.run(num_ranks, run_fit, model, str(tmp_path), "run", groups)[0]["metrics"])
    wanted = pool.run(1, upstream_losses, model, groups, kind)[0]
    assert len(ours) == 6 and ours == pytest.approx(wanted, rel=FP32_LOSSES)


@pytest.mark.parametrize("kind", some_in_full(CASES, FAST))
def test_a_run_resumes_and_its_adapter_loads_in_plain_peft(pool, tmp_path, kind):
    model, groups = CASES[kind].write(tmp_path)
    groups["checkpoint"] = {"every_steps": 3}
    whole = pool.run(2, run_fit, model, str(tmp_path), "whole", groups)[0]
    pool.run(2, run_fit, model, str(tmp_path), "split", {**groups, "train": {"max_steps": 3}})
    pool.run(2, run_fit, model, str(tmp_path), "split", groups)
    assert essence(metrics(tmp_path / "split"))[-1] == essence(metrics(tmp_path / "whole"))[-1]
    summary = whole["summary"]
    assert summary["metrics_after"].keys() == summary["metrics_before"].keys() != set()
    adapter = tmp_path / "whole/adapter"
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    trains_head = build_objective(groups["objective"]["name"]).trains_head
    assert bool(config["modules_to_save"]) == trains_head
    if trains_head:
        named = AutoConfig.from_pretrained(adapter)
        assert named.num_labels == len(named.id2label)
        assert named.architectures[0].endswith("Classification")
    assert torch.isfinite(torch.tensor(summary["eval_loss_after"]))
    loss, saved = pool.run(1, exported_outputs, model, groups, str(adapter))[0]
    assert torch.isfinite(loss).all() and bool(saved) == trains_head


def _fit(ranks, folder, root, name, groups, evaluates):
    """Train with the library, perhaps after an evaluation; return the losses of all steps."""
    prepared = build(ranks, folder, **groups, run={"output_root": root, "name": name})
    if evaluates:
        evaluate_prepared(prepared)
    fit(prepared)
    prepared.close()
    return essence(metrics(Path(root) / name))


WHOLE = {"quant": {"name": "none", "double_quant": False}, "lora": {"variant": "none"}}


@pytest.mark.parametrize("more", [{}, pytest.param(WHOLE, marks=pytest.mark.full)], ids=["a head", "the whole base"])
def test_an_evaluation_before_a_run_changes_nothing(pool, tmp_path, more):
    model, groups = CASES["bert, pairs and numbers"].write(tmp_path)
    runs = [
        pool.run(2, _fit, model, str(tmp_path), str(first), {**groups, **more}, first)[0] for first in (False, True)
    ]
    assert runs[0] == runs[1] and len(runs[0]) >= 6


def _unused_products(ranks, folder, groups):
    """Return the linears whose product was computed beside that of another, and which nobody asked for."""
    prepared = build(ranks, folder, **groups)
    assert prepared.data is not None and prepared.data.train is not None
    rows = prepared.data.encoder.rows(prepared.data.train)
    build_objective(prepared.settings.objective).sums(prepared.model.train(), rows.collate([0, 1], 0))
    groups = {
        id(m.sharing): m.sharing for m in prepared.model.modules() if isinstance(m, QuantLoraLinear) and m.sharing
    }
    return len(groups), [str(group.layers) for group in groups.values() if not group.idle]


@pytest.mark.parametrize("kind", some_in_full(CASES, {"bart, int8"}))
def test_no_product_is_computed_for_nothing(pool, tmp_path, kind):
    """Cross-attention's queries read other states than its keys and values."""
    model, groups = CASES[kind].write(tmp_path)
    count, unused = pool.run(1, _unused_products, model, groups)[0]
    assert not unused
    assert count or CASES[kind].family not in ("bart", "whisper")


def _checked(ranks, folder, groups):
    """Return what the check against upstream says."""
    try:
        return build(ranks, folder, **groups, model={"check": "always"}).choices["model.check"].value
    except ModelError as error:
        return str(error)


@pytest.mark.parametrize("kind", some_in_full(CASES, FAST))
def test_a_model_is_compared_with_upstreams_code(pool, tmp_path, kind):
    model, groups = CASES[kind].write(tmp_path)
    assert set(pool.run(2, _checked, model, groups)) == {"equal to upstream's own code"}


def _with_unmasked_padding(ranks, folder, groups):
    """Return what the check says of code that forgets the mask of padded rows."""
    outputs = CausalModel.outputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalModel, "outputs", lambda self, attention_mask, **rest: outputs(self, **rest))
        return _checked(ranks, folder, groups)


def test_a_forgotten_mask_is_found(pool, tmp_path):
    model, groups = CASES["bert, pairs and numbers"].write(tmp_path)
    assert "would not match its own code" in pool.run(1, _with_unmasked_padding, model, groups)[0]


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("kind", CASES)
def test_planned_bytes_are_held(pool, tmp_path, kind, num_ranks):
    model, groups = CASES[kind].write(tmp_path)
    results = pool.run(num_ranks, held_and_planned, model, groups)
    planned = results[0][1]
    assert {key: max(held[key] for held, _ in results) for key in planned} == planned


SPREAD = {
    "adapters on every rank": {"fsdp": {"adapters": "replicated"}},
    "a copy on every rank": {"fsdp": {"shard_degree": 1, "replicate_degree": 2}},
    "layers recomputed": {"train": {"activation_checkpointing": "full"}},
    "layers kept gathered": {"fsdp": {"reshard_after_forward": "false"}},
    "parameters on the host": {"fsdp": {"offload": "params"}},
    "paged optimizer": {"optim": {"name": "paged_adamw_32bit"}},
    "micro-batches by tokens": {"train": {"micro_batch_tokens": 48}},
    "rows grouped by length": {"data": {"length_grouped": True}, "compare": False},
}


@pytest.mark.full
@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("kind", ["llama, names", "bert, pairs and numbers"])
def test_how_it_is_spread_changes_no_loss(pool, tmp_path, kind, how):
    model, groups = CASES[kind].write(tmp_path)
    plain = losses(pool.run(2, run_fit, model, str(tmp_path), "plain", groups)[0]["metrics"])
    asked = {name: settings for name, settings in SPREAD[how].items() if name != "compare"}
    merged = {name: {**groups.get(name, {}), **asked.get(name, {})} for name in {*groups, *asked}}
    layout = "copies" if how == "a copy on every rank" else "shard"
    other = losses(pool.run(2, run_fit, model, str(tmp_path), "other", merged, layout=layout)[0]["metrics"])
    assert len(other) == len(plain)
    if SPREAD[how].get("compare", True):
        assert other == pytest.approx(plain, rel=FP32_LOSSES)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama, names", "bert, pairs and numbers"])
def test_the_whole_base_is_trained_too(pool, tmp_path, kind):
    model, groups = CASES[kind].write(tmp_path)
    groups |= {"quant": {"name": "none", "double_quant": False}, "lora": {"variant": "none"}, "optim": {"lr": 2e-4}}
    one = pool.run(1, run_fit, model, str(tmp_path), "one", groups)[0]
    two = pool.run(2, run_fit, model, str(tmp_path), "two", groups)[0]
    assert losses(two["metrics"]) == pytest.approx(losses(one["metrics"]), rel=FP32_LOSSES)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two/model")
    assert trained.config.num_labels == len(trained.config.id2label)
