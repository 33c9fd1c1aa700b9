"""EVA on a base that is loaded sharded and quantized.

The judge is `peft.initialize_lora_eva_weights` on a dense float32 copy of the dequantized weights, with the
micro-batches of the run.
"""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from transformers import AutoTokenizer

from fsdp_qlora.adapters.names import ADAPTER, trainable_parameters
from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import Cut, Loader, MicroBatch, TokenRows
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.distributed.mesh import Ranks
from tests.build import build, whole
from tests.distributed.test_families import LR
from tests.distributed.test_peft_methods import QUANT, TARGETS, _dense_copy, _ids
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES

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
    data = DataSettings(train=str(rows), max_length=64)
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
    model = prepared.model.eval()
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
    for name, gradient in first["gradients"].items():
        assert (
            name not in plain["gradients"] or not torch.equal(gradient, plain["gradients"][name]) or not gradient.any()
        )
