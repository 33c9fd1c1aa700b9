"""EVA on a base that is loaded sharded and quantized.

The judge is `peft.initialize_lora_eva_weights` on a dense float32 copy of the dequantized weights, with the
micro-batches of the run.
"""

from __future__ import annotations

import json
import logging
from itertools import count, islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import AutoTokenizer

from fsdp_qlora.adapters.names import ADAPTER, trainable_parameters
from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import Cut, Loader, MicroBatch, TokenRows
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.run.inference import load_for_inference
from tests.build import build, config_of, essence, losses, norms, run_fit, whole, world_of
from tests.distributed.test_families import LR
from tests.distributed.test_peft_methods import QUANT, TARGETS, _dense_copy, _ids
from tests.distributed.test_starts import refused
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, FP32_NORMS, apart

R, ALPHA = 4, 8


def settings_of(quant: str, rows: Path | None, **more: Any) -> dict[str, Any]:
    """Return the groups of a run in float32."""
    groups: dict[str, dict[str, Any]] = {
        "lora": {"r": R, "alpha": ALPHA, "variant": "eva"}, "quant": QUANT[quant],
        "precision": {"name": "fp32"}, "model": {"check": "off"}, "optim": {"lr": LR},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip
    if rows is not None:
        groups["data"] = {"train": str(rows), "max_length": 64}
    return {**groups, **{name: {**groups.get(name, {}), **values} for name, values in more.items()}}


def micro_batches(folder: Path, rows: Path, cache: Path) -> list[MicroBatch]:
    """Return the first micro-batches of a run, in their order."""
    data = DataSettings(train=str(rows), max_length=64, eval_fraction=0.0)
    tokens = prepare_data(data, 0, AutoTokenizer.from_pretrained(folder), cache)
    assert tokens.train is not None
    loader = Loader(TokenRows(tokens.train), 6, Cut(2, 0, 1), 0)
    return list(islice((m for step in count() for m in loader.batch_at(step * 6).micro_batches), 400))


def judged(folder: Path, quant: str, batches: list[MicroBatch], **eva: Any) -> Any:
    """Return PEFT's model with EVA's adapters."""
    lora = {"r": R, "lora_alpha": ALPHA, **{k: eva.pop(k) for k in ("rank_pattern", "use_dora") if k in eva}}
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(**eva), **lora)
    model = get_peft_model(_dense_copy(folder, quant), config)
    given = [{"input_ids": m.input_ids, "labels": m.labels} for m in batches]
    initialize_lora_eva_weights(model, given, show_progress_bar=False)
    return model


def _loaded(ranks: Ranks, folder: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Return A, B, rank and scaling by target, the planned and the held bytes, the first loss and its gradients."""
    prepared = build(ranks, folder, **groups)
    model = prepared.model.train()
    values = {}
    for name, layer in adapted_layers(model).items():
        a, b = (whole(getattr(layer, kind)[ADAPTER].weight.detach()).clone() for kind in ("lora_A", "lora_B"))
        values[name[name.index("base_model") :]] = (a, b, layer.scaling[ADAPTER])
    loss = model(_ids(), _ids()).sum()
    loss.backward()
    gradients = {name: whole(p.grad).clone() / ranks.size for name, p in trainable_parameters(model)}
    return {
        "values": values, "loss": float(loss.detach()), "gradients": gradients, "digest": prepared.model.starts.digest,
    }  # fmt: skip


def subspace_apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the sine of the largest angle between the spaces of two sets of rows."""
    q, p = (torch.linalg.qr(x.double().T)[0] for x in (ours, theirs))
    return float(torch.linalg.matrix_norm(q - p @ (p.T @ q), ord=2))


@pytest.mark.parametrize("quant", some_in_full(QUANT, {"nf4"}))
def test_directions_and_ranks_are_pefts(pool, tiny_model, chat_rows, tmp_path, quant):
    groups = settings_of(quant, chat_rows)
    loaded = {n: pool.run(n, _loaded, str(tiny_model), groups)[0] for n in (1, 2, 3)}
    first = loaded[1]
    for n in (2, 3):  # the same bits at any number of ranks
        assert loaded[n]["digest"] == first["digest"] != ""
        for key, (a, b, scaling) in first["values"].items():
            assert torch.equal(loaded[n]["values"][key][0], a) and loaded[n]["values"][key][2] == scaling
            assert not b.any()
    judge = judged(tiny_model, quant, micro_batches(tiny_model, chat_rows, tmp_path / "cache"))
    layers = adapted_layers(judge)
    assert {name: len(a) for name, (a, _, _) in first["values"].items()} == {n: x.r[ADAPTER] for n, x in layers.items()}
    assert len({len(a) for a, _, _ in first["values"].values()}) > 1
    for name, layer in layers.items():
        a, _, scaling = first["values"][name]
        theirs = layer.lora_A[ADAPTER].weight.detach()
        assert scaling == layer.scaling[ADAPTER]
        assert subspace_apart(a, theirs) < 1e-3, name
        assert torch.nn.functional.cosine_similarity(a, theirs).abs().min() > 0.999, name
    plain = pool.run(2, _loaded, str(tiny_model), settings_of(quant, chat_rows, lora={"variant": "lora"}))[0]
    assert first["loss"] == pytest.approx(plain["loss"], rel=FP32_LOSSES)  # B is zero: the base's own loss
    for name, gradient in first["gradients"].items():  # A's are zero, because B is
        assert bool(gradient.any()) == (".lora_B." in name)
        if ".lora_B." in name:
            assert not torch.equal(gradient, plain["gradients"][name])


@pytest.mark.full
@pytest.mark.parametrize(
    "eva",
    [
        {"rho": 1.0}, {"tau": 0.9}, {"adjust_scaling_factors": False}, {"rho": 1.5, "rank_pattern": {"v_proj": 6}},
        {"whiten": True}, {"use_dora": True},
    ],
    ids=str,
)  # fmt: skip
def test_settings_mean_what_they_mean_in_peft(pool, tiny_model, chat_rows, tmp_path, eva):
    shared = ("rank_pattern", "use_dora")
    lora = {name if name in shared else f"eva_{name}": value for name, value in eva.items()}
    values = pool.run(2, _loaded, str(tiny_model), settings_of("nf4", chat_rows, lora=lora))[0]["values"]
    layers = adapted_layers(judged(tiny_model, "nf4", micro_batches(tiny_model, chat_rows, tmp_path / "cache"), **eva))
    assert {name: len(a) for name, (a, _, _) in values.items()} == {n: x.r[ADAPTER] for n, x in layers.items()}
    for name, layer in layers.items():
        (a, _, scaling), theirs = values[name], layer.lora_A[ADAPTER].weight.detach()
        assert scaling == layer.scaling[ADAPTER]
        assert torch.nn.functional.cosine_similarity(a, theirs).abs().min() > 0.999, name
        if not eva.get("whiten") or name.endswith(("o_proj", "down_proj")):  # the only ones that share no input
            assert torch.allclose(a.norm(dim=1), theirs.norm(dim=1), rtol=1e-3), name


def _fit(ranks: Ranks, folder: str, root: str, name: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Train as `run_fit`; return also whether rows were searched."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fsdp_qlora.run.eva")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        result = run_fit(ranks, folder, root, name, groups)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return result | {"searched": any("micro-batches settled" in text for text in said)}


def _answers(ranks: Ranks, folder: str, adapter: str, quant: str) -> torch.Tensor:
    config = config_of(folder, quant=QUANT[quant], precision={"name": "fp32"}, model={"check": "off"})
    with torch.no_grad():
        return load_for_inference(config, Path(adapter), world_of(ranks)).model.logits(_ids())


@pytest.mark.parametrize("quant", some_in_full(QUANT, set()))
def test_trains_resumes_without_a_search_and_plain_peft_loads_the_export(pool, tiny_model, chat_rows, tmp_path, quant):
    groups = settings_of(quant, chat_rows, checkpoint={"every_steps": 2})
    runs = {n: pool.run(n, _fit, str(tiny_model), str(tmp_path), f"on{n}", dict(groups))[0] for n in (1, 2, 3)}
    for run in runs.values():
        assert run["searched"]
        assert max(apart(losses(run["metrics"]), losses(runs[1]["metrics"]))) <= FP32_LOSSES
        assert max(apart(norms(run["metrics"]), norms(runs[1]["metrics"]))) <= FP32_NORMS
    split = {**groups, "train": {"max_steps": 2}}
    for name, kept in (("same", True), ("again", False)):
        pool.run(2, _fit, str(tiny_model), str(tmp_path), name, dict(split))
        if not kept:  # searched again: the same bits
            (tmp_path / name / FILE_NAME).unlink()
        resumed = pool.run(2, _fit, str(tiny_model), str(tmp_path), name, dict(groups))[0]
        assert resumed["searched"] != kept
        assert essence(resumed["metrics"]) == essence(runs[2]["metrics"])
        exported = [tmp_path / run / "adapter/adapter_model.safetensors" for run in (name, "on2")]
        assert exported[0].read_bytes() == exported[1].read_bytes()
        assert (tmp_path / name / FILE_NAME).read_bytes() == (tmp_path / "on1" / FILE_NAME).read_bytes()
    adapter = tmp_path / "on2" / "adapter"
    assert not (adapter / FILE_NAME).exists()
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == "eva" and written["eva_config"]["rho"] == 2.0
    assert written["rank_pattern"] and written["alpha_pattern"]
    plain: Any = PeftModel.from_pretrained(_dense_copy(tiny_model, quant), adapter).eval()
    mine = pool.run(2, _answers, str(tiny_model), str(adapter), quant)[0]
    with torch.no_grad():
        torch.testing.assert_close(mine, plain(input_ids=_ids()).logits, rtol=1e-4, atol=1e-5)


def _held(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return this rank's bytes, those of the plan, and those of the plan before rows were seen."""
    prepared = build(ranks, folder, **groups)
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    before = make_plan(prepared.config, prepared.shapes, ranks.size)
    held = {
        "base": sum(resident_bytes(m) for m in prepared.model.modules() if isinstance(m, QuantMatrices)),
        "adapters": sum(local_tensor(p).numel() * 4 for _, p in trainable_parameters(prepared.model)),
        "optimizer": optimizer.state_bytes(),
    }  # fmt: skip
    plans = (prepared.plan.bytes, before.bytes)
    after, bound = (
        {"base": b.base_packed + b.base_statistics, "adapters": b.adapters, "optimizer": b.optimizer} for b in plans
    )
    assert before.start is not None and before.start.bytes > 0
    return held, after, bound


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_plan_is_a_bound_before_and_exact_after(pool, tiny_model, chat_rows, num_ranks):
    results = pool.run(num_ranks, _held, str(tiny_model), settings_of("nf4", chat_rows))
    _, after, bound = results[0]
    for key, planned in after.items():
        assert planned == max(held[key] for held, _, _ in results), key
    assert bound["base"] == after["base"]
    assert bound["adapters"] > after["adapters"] and bound["optimizer"] > after["optimizer"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (False, {}, "2 data.train: not set, and lora.init_lora_weights=eva starts from what the base makes"),
        (True, {"lora": {"r": 70}}, "2 lora.init_lora_weights: eva looks for 140 directions"),
        (True, {"lora": {"r": 40}}, "lora.init_lora_weights: eva looks for 80 directions in the input of model."),
    ],
)
def test_what_cannot_start_is_refused(pool, tiny_model, chat_rows, rows, more, said):
    groups = settings_of("nf4", chat_rows if rows else None, train={"micro_batch_size": 1}, **more)
    assert said in pool.run(2, refused, str(tiny_model), groups)[0]
