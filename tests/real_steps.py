"""A real step whose tensors are counted as those of a simulated one, and the two beside each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.simulate.step import simulate, step_runner, worst_batch
from fsdp_qlora.simulate.tracker import measure_step
from tests.build import build, config_of
from tests.pool import Pool


def take_real_steps(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[int, list[float]]:
    """Return the peak of this rank's tensors in a real step, and its losses before, while and after it is tracked.

    What is simulated multiplies in 16 bits. A CPU that cannot (`quant/gemm.py`) does so here, too, where it is not long.
    """
    prepared = build(ranks, folder, **groups)
    if prepared.plan.base_parameters > 10_000_000:
        return _steps(prepared, ranks)
    with mock.patch("fsdp_qlora.quant.gemm._has_product", lambda dtype: True):
        return _steps(prepared, ranks)


def _steps(prepared: Prepared, ranks: Ranks) -> tuple[int, list[float]]:
    model, config = prepared.model, prepared.settings
    batch = worst_batch(prepared.plan, config, model.base, prepared.folder, ranks.rank)
    run = step_runner(build_objective(config.objective), config, model, batch, ranks)
    optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
    losses: list[float] = []

    def run_and_note(before_each: Callable[[], None]) -> None:
        losses.append(float(run(before_each).values[0]))  # type: ignore[attr-defined]

    run(lambda: None)
    optimizer.step(1e-3, 0.5)
    run_and_note(lambda: None)
    optimizer.zero_grad()
    peaks = measure_step(model, optimizer.inner, run_and_note, lambda: optimizer.step(0.0, 0.5))
    run_and_note(lambda: None)
    return max(peak.total for peak in peaks.device.values()), losses


def require_alike(pool: Pool, folder: Path, groups: dict[str, Any], ranks: int = 2) -> float:
    """Compare simulated with real; return how far they are apart."""
    simulation = simulate(config_of(str(folder), **groups), ranks)
    real = pool.run(ranks, take_real_steps, str(folder), groups)
    fullest = max(peak for peak, _ in real)
    apart = abs(simulation.peak_bytes / fullest - 1)
    print(f"simulated {simulation.peak_bytes / 2**20:.2f} MiB, real {fullest / 2**20:.2f} MiB, {simulation.place}")
    assert apart < 0.1, (simulation.peak_bytes, real)
    for _, (before, tracked, after) in real:
        assert before == tracked == after  # counting changes nothing, and leaves nothing behind
    assert not torch.distributed.is_initialized()
    return apart
