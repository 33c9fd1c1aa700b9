"""Every rank keeps the whole model (``fsdp.replicate_degree`` = number of ranks): nothing is gathered, same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_qlora.checks.gather import verify_gather
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import tensor_sha256
from tests.build import build, losses, metrics, norms, run_fit
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, FP32_NORMS, apart

STEPS = {"max_steps": 4, "global_batch_size": 7, "micro_batch_size": 2}  # 4 micro-batches: uneven over the ranks
Layout = tuple[int, str]
REPLICAS = {"shard": lambda num_ranks: 1, "hybrid": lambda num_ranks: 2, "copies": lambda num_ranks: num_ranks}


def _groups(rows: Path, layout: Layout, **more: dict[str, Any]) -> dict[str, Any]:
    num_ranks, kind = layout
    return {
        "data": {"train": str(rows), "max_length": 64}, "train": STEPS, "precision": {"name": "fp32"},
        "fsdp": {"replicate_degree": REPLICAS[kind](num_ranks)}, "optim": {"weight_decay": 0.01},
        "schedule": {"name": "constant"}, **more,
    }  # fmt: skip


def _train(pool, layout: Layout, model: Path, rows: Path, root: Path, **more: dict[str, Any]) -> dict[str, Any]:
    num_ranks, kind = layout
    name = f"{num_ranks}-{kind}"
    groups = _groups(rows, layout, **more)
    return pool.run(num_ranks, run_fit, str(model), str(root), name, groups, layout=kind)[0]


@pytest.mark.parametrize("quant", some_in_full(["nf4", "fp4", "int8", "none"], ["nf4"]))
def test_every_layout_gives_the_same_numbers(pool, tiny_model, chat_rows, tmp_path, quant):
    more = {"quant": {"name": quant, "double_quant": quant in ("nf4", "fp4")}}
    wanted = _train(pool, (1, "shard"), tiny_model, chat_rows, tmp_path, **more)["metrics"]
    assert losses(wanted)[0] - losses(wanted)[-1] > 1e-2
    for layout in ((2, "shard"), (2, "copies"), (4, "hybrid"), (4, "copies")):
        lines = _train(pool, layout, tiny_model, chat_rows, tmp_path, **more)["metrics"]
        assert max(apart(losses(lines), losses(wanted))) < FP32_LOSSES, layout
        assert max(apart(norms(lines), norms(wanted))) < FP32_NORMS, layout


def test_each_rank_reads_and_quantizes_its_part_of_a_copy(pool, tiny_model, chat_rows, tmp_path):
    summary = _train(pool, (2, "copies"), tiny_model, chat_rows, tmp_path)["summary"]
    sharded = _train(pool, (2, "shard"), tiny_model, chat_rows, tmp_path)["summary"]
    assert [r["bytes_read"] for r in summary["ranks"]] == [r["bytes_read"] for r in sharded["ranks"]]
    one = _train(pool, (1, "shard"), tiny_model, chat_rows, tmp_path)["summary"]
    assert {rank["quantized_bytes"] for rank in summary["ranks"]} == {one["ranks"][0]["quantized_bytes"]}


@pytest.mark.parametrize(
    "before, after",
    some_in_full([((2, "copies"), (2, "shard")), ((2, "shard"), (1, "shard"))], [((2, "copies"), (2, "shard"))]),
)
def test_a_checkpoint_resumes_in_another_layout(pool, tiny_model, chat_rows, tmp_path, before, after):
    name = f"{before[0]}-{before[1]}"
    whole = _train(pool, before, tiny_model, chat_rows, tmp_path / "whole")["metrics"]
    _train(pool, before, tiny_model, chat_rows, tmp_path, train={**STEPS, "max_steps": 2})
    groups = _groups(chat_rows, after)
    pool.run(after[0], run_fit, str(tiny_model), str(tmp_path), name, groups, layout=after[1])
    assert max(apart(losses(metrics(tmp_path / name)), losses(whole))) < FP32_LOSSES


def _digests(ranks, model: str, replicas: int) -> dict[str, Any]:
    prepared = build(ranks, model, fsdp={"replicate_degree": replicas})
    modules = {n: m for n, m in prepared.model.named_modules() if isinstance(m, QuantMatrices)}
    sharded = [p for p in prepared.model.parameters() if isinstance(p, DTensor)]
    units = [m for m in prepared.model.modules() if isinstance(m, FSDPModule)]
    kept = {n: tensor_sha256(p) for n, p in prepared.model.named_parameters() if not isinstance(p, DTensor)}
    return {"sharded": len(sharded), "units": len(units), "modules": len(modules), "kept": kept}


def test_copies_are_those_of_one_rank_bit_for_bit(pool, tiny_model):
    alone = pool.run(1, _digests, str(tiny_model), 1)[0]
    assert alone["sharded"] == 0 and alone["units"] == 1 and alone["modules"] > 0  # the root alone
    for copy in pool.run(3, _digests, str(tiny_model), 3, layout="copies"):
        assert copy == alone


def _planted(ranks, model: str) -> str:
    prepared = build(ranks, model, fsdp={"replicate_degree": ranks.size})
    verify_gather(prepared.model, ranks)
    module = next(m for m in prepared.model.modules() if isinstance(m, QuantMatrices))
    if ranks.rank == 1:
        with torch.no_grad():
            module.packed.view(-1).view(torch.uint8)[5] ^= 1
    try:
        verify_gather(prepared.model, ranks)
    except NumericsError as error:
        return str(error)
    return ""


def test_a_copy_that_differs_is_named_on_every_rank(pool, tiny_model):
    for found in pool.run(2, _planted, str(tiny_model), layout="copies"):
        assert "rank 1 keeps different bytes than rank 0" in found
