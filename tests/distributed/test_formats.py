"""Every format of the base, sharded: its bytes are bitsandbytes', its losses those of stock bitsandbytes and PEFT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.plan.quantized import describe
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import bits_to_float
from tests.build import build, losses, run_fit, whole
from tests.distributed.test_families import LR, _batches
from tests.families import NF4, reference, reference_losses
from tests.pool import Pool
from tests.tiers import some_in_full
from tests.tolerances import UPSTREAM_FIRST_LOSS, UPSTREAM_LOSSES

INT8 = {"name": "int8", "double_quant": False}


def _linears(ranks: Ranks, folder: str, quant: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    prepared = build(ranks, folder, quant=quant)
    found = {}
    for name, module in prepared.model.base.named_modules():
        if isinstance(module, QuantLinear):
            parts = {k: p for k in ("packed", "absmax", "nested") if (p := getattr(module, k)) is not None}
            found[name.removesuffix(".base_layer")] = {k: whole(p) for k, p in parts.items()}
    return found if ranks.is_main else {}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sharded_int8_rows_equal_bitsandbytes(pool: Pool, tiny_model: Path, num_ranks: int) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    for layer, found in pool.run(num_ranks, _linears, str(tiny_model), INT8)[0].items():
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weights[f"{layer}.weight"].half())
        assert torch.equal(found["packed"], codes), layer
        assert torch.equal(bits_to_float(found["absmax"]).reshape(-1), absmax), layer


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("block_size", [128, 4096])
def test_sharded_blocks_of_any_size_equal_bitsandbytes(pool: Pool, tiny_model: Path, num_ranks: int, block_size: int):
    """With double quantization: nested blocks of 256 statistics then span the rows of several ranks."""
    weights = load_file(tiny_model / "model.safetensors")
    torch.set_num_threads(1)
    found = pool.run(num_ranks, _linears, str(tiny_model), {"block_size": block_size})[0]
    for layer, parts in found.items():
        weight = weights[f"{layer}.weight"]
        _, state = bnb.functional.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=True, quant_type="nf4"
        )
        blocks, together = state.absmax.numel(), 256 * block_size // 16384
        assert torch.equal(parts["absmax"].reshape(-1)[:blocks], state.absmax.reshape(-1)), layer
        assert torch.equal(bits_to_float(parts["nested"]).reshape(-1)[::together], state.state2.absmax), layer


def _held(ranks: Ranks, folder: str, quant: dict[str, Any]) -> tuple[int, int, str]:
    prepared = build(ranks, folder, quant=quant)
    planned = prepared.plan.bytes
    held = sum(resident_bytes(m) for m in prepared.model.base.modules() if isinstance(m, QuantMatrices))
    return planned.base_packed + planned.base_statistics, held, describe(prepared.plan.quantized)


MIXED = {"overrides": {"*.down_proj": "int8", "*.layers.0.*": "fp4", "*.0.self_attn.q_proj": "none"}}


@pytest.mark.parametrize(
    "quant", [INT8, {"block_size": 256}, {"embeddings": "int8"}, {**INT8, "embeddings": "int8"}, MIXED], ids=str
)
def test_planned_bytes_are_the_held_ones(pool: Pool, tiny_model: Path, quant: dict[str, Any]) -> None:
    for num_ranks in (1, 2, 3):
        found = pool.run(num_ranks, _held, str(tiny_model), quant)
        planned, held, said = found[0]
        assert planned == held == max(h for _, h, _ in found)
    if quant is MIXED:
        assert said == "6 fp4 with double quantization, 6 nf4 with double quantization, 1 int8 (threshold 6)"


def _run(pool: Pool, ranks: int, folder: Path, rows: Path, root: Path, groups: dict[str, Any]) -> list[float]:
    """Four steps on the six rows, as `test_families` does."""
    common = {
        "data": {"train": str(rows), "max_length": 64, "max_rows": 6},
        "optim": {"lr": LR}, "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip
    train = {"max_steps": 4, "global_batch_size": 6, "micro_batch_size": 2, **groups.get("train", {})}
    name = f"run{sum(1 for _ in root.iterdir())}"
    run = pool.run(ranks, run_fit, str(folder), str(root), name, {**common, **groups, "train": train})[0]
    return losses(run["metrics"])


def _four_bit(kind: str, double_quant: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _eight_bit(threshold: float) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)


FORMATS: dict[str, tuple[dict[str, Any], BitsAndBytesConfig]] = {
    "int8": (INT8, _eight_bit(6.0)),
    "int8, threshold 0": ({**INT8, "llm_int8_threshold": 0.0}, _eight_bit(0.0)),
    "int8, threshold 1": ({**INT8, "llm_int8_threshold": 1.0}, _eight_bit(1.0)),
    "nf4": ({}, NF4),
    "nf4, not nested": ({"double_quant": False}, _four_bit("nf4", False)),
    "fp4": ({"name": "fp4"}, _four_bit("fp4", True)),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offload": {"fsdp": {"offload": "all"}},
    "checkpointing": {"train": {"activation_checkpointing": "full"}},
}
QUICK = {("int8", "plain"), ("int8, threshold 1", "checkpointing")}


@pytest.mark.parametrize(("kind", "way"), some_in_full(itertools.product(FORMATS, WAYS), QUICK))
def test_trains_as_stock_bitsandbytes_and_peft_do(pool, tiny_model, chat_rows, tmp_path, kind, way):
    quant, stock = FORMATS[kind]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = reference(tiny_model, targets, r=4, alpha=8, quant=stock)
    wanted = reference_losses(model, _batches(tiny_model, chat_rows, tmp_path / "cache"), LR)
    assert wanted[0] - wanted[-1] > 0.01
    for num_ranks in (1, 2, 3):
        found = _run(pool, num_ranks, tiny_model, chat_rows, tmp_path, {"quant": quant, **WAYS[way]})
        # bf16: sums in another order; int8: on other ranks other rows share the choice of outlier columns
        assert found[0] == pytest.approx(wanted[0], rel=UPSTREAM_FIRST_LOSS)
        assert found == pytest.approx(wanted, rel=UPSTREAM_LOSSES)


def test_mixed_formats_skipped_linears_and_int8_edges_train(pool, tiny_model, chat_rows, tmp_path):
    """Each is near the losses of the 16-bit base, and no two are the same."""
    found = {
        name: _run(pool, 2, tiny_model, chat_rows, tmp_path, {"quant": quant})
        for name, quant in {
            "bf16": {"name": "none"}, "nf4": {}, "mixed": MIXED, "int8 edges": {"embeddings": "int8"},
            "blocks of 4096": {"block_size": 4096},
        }.items()
    }  # fmt: skip
    for name, mine in found.items():
        assert mine == pytest.approx(found["bf16"], rel=2e-2), name
    assert len({mine[0] for mine in found.values()}) == len(found)


def _refused(ranks: Ranks, folder: str, quant: dict[str, Any]) -> str:
    try:
        build(ranks, folder, quant=quant)
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_a_pattern_that_matches_nothing_is_refused(pool: Pool, tiny_model: Path) -> None:
    said = pool.run(1, _refused, str(tiny_model), {"overrides": {"*.q_prj": "int8"}})[0]
    assert said.startswith("2 quant.overrides: '*.q_prj' matches none") and "q_proj" in said
