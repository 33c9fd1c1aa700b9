"""Packed, compiled runs: few compilations whatever the lengths, the losses of layers as written, and a clear fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.model.families import decoder_layers
from fsdp_qlora.parallel.compile import MOST_COMPILATIONS
from fsdp_qlora.plan.compilation import Compilation
from fsdp_qlora.run import prepare as api
from fsdp_qlora.run.fit import fit
from tests.build import build, losses, metrics, run_fit
from tests.families import write_family
from tests.pool import Pool
from tests.tolerances import FP32_LOSSES

STEPS = 60
CASES = {
    "llama, varlen": ("llama", "varlen", 2),
    "qwen3, one row": ("qwen3", "auto", 1),
    "gemma3_text, windows": ("gemma3_text", "auto", 2),
    "mistral, varlen": ("mistral", "varlen", 3),
}
"""Name -> family, attention, packed sequences in a micro-batch."""


def fit_and_count(ranks: Ranks, folder: str, root: str, name: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Train; return what `run_fit` does and the number of graphs that were compiled."""
    from torch._dynamo.utils import counters

    counters.clear()
    found = run_fit(ranks, folder, root, name, groups)
    return {**found, "graphs": counters["stats"]["unique_graphs"]}


def _groups(rows: Path, attention: str, sequences: int, compiled: bool) -> dict[str, Any]:
    return {
        "model": {"attn_implementation": attention}, "precision": {"name": "fp32"}, "schedule": {"name": "constant"},
        "data": {"train": str(rows), "packing": True, "max_length": 160}, "optim": {"lr": 1e-4},
        "train": {
            "max_steps": STEPS, "global_batch_size": 2 * sequences + 1, "micro_batch_size": sequences,
            "compile": "true" if compiled else "false",
        },
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_packed_compiled_run_compiles_at_most_four_times(
    pool: Pool, chat_rows: Path, tmp_path: Path, case: str
) -> None:
    family, attention, sequences = CASES[case]
    folder = write_family(tmp_path / "model", family)
    runs = [
        pool.run(2, fit_and_count, str(folder), str(tmp_path), name, _groups(chat_rows, attention, sequences, compiled))
        for name, compiled in (("compiled", True), ("plain", False))
    ]
    (compiled, *others), (plain, _) = runs
    assert 1 <= compiled["graphs"] <= MOST_COMPILATIONS and all(x["graphs"] <= MOST_COMPILATIONS for x in others)
    assert compiled["summary"]["auto"]["train.compile"] == "true (as asked)"
    found, wanted = losses(compiled["metrics"]), losses(plain["metrics"])
    assert len(found) == len(wanted) == STEPS
    assert found == pytest.approx(wanted, rel=1e-4)


def break_on(ranks: Ranks, folder: str, root: str, groups: dict[str, Any], broken: list[int]) -> list[Any]:
    """Train with layers that cannot be compiled on the ranks ``broken``; return how it ended."""
    prepared = build(ranks, folder, run={"output_root": root, "name": "broken"}, **groups)
    assert prepared.model.compiled

    def step_out(module: nn.Module, args: Any, output: Any) -> None:
        torch._dynamo.graph_break()

    for layer in decoder_layers(prepared.model.base) if ranks.rank in broken else ():
        layer.mlp.register_forward_hook(step_out)  # type: ignore[union-attr]
    try:
        result = fit(prepared)
    except ConfigError as error:
        return ["ended", str(error), error.exit_code]
    return ["trained", result.summary["auto"]["train.compile"], losses(metrics(Path(root) / "broken"))]


@pytest.mark.full
@pytest.mark.parametrize("broken", [[0], [0, 1]], ids=["one rank", "both"])
def test_compiling_that_was_asked_for_and_fails_ends_the_run(
    pool: Pool, tiny_model: Path, chat_rows: Path, tmp_path: Path, broken: list[int]
) -> None:
    groups = _groups(chat_rows, "auto", 2, True)
    for outcome, said, code in pool.run(2, break_on, str(tiny_model), str(tmp_path), groups, broken):
        assert outcome == "ended" and code == 2
        assert said.startswith("train.compile: the layers of this model cannot be compiled")


def break_auto(ranks: Ranks, folder: str, root: str, groups: dict[str, Any]) -> list[Any]:
    """The same where ``auto`` chose to compile: on rank 1 alone."""
    original = api.compilation_for
    api.compilation_for = lambda *_: Compilation(True, "for this test")
    try:
        return break_on(ranks, folder, root, groups, [1])
    finally:
        api.compilation_for = original


@pytest.mark.full
def test_compiling_that_auto_chose_and_fails_on_one_rank_is_left_by_all_and_said(
    pool: Pool, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    groups = _groups(chat_rows, "auto", 2, False)
    groups["train"] |= {"max_steps": 4, "compile": "auto"}
    found = pool.run(2, break_auto, str(tiny_model), str(tmp_path / "auto"), groups)
    groups["train"]["compile"] = "false"
    plain = pool.run(2, run_fit, str(tiny_model), str(tmp_path), "plain", groups)[0]
    for outcome, said, trained in found:
        assert outcome == "trained" and said.startswith("false (compilation failed at step 1: rank 1: ")
        assert trained == pytest.approx(losses(plain["metrics"]), rel=FP32_LOSSES)
