"""A simulated step takes the memory that a real one takes, counted by the same tracker on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.quant import gemm
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.simulate.step import simulate, step_runner, worst_batch
from fsdp_qlora.simulate.tracker import measure_step
from tests import tiny
from tests.build import build, config_of
from tests.pool import Pool
from tests.tiers import some_in_full


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
    model, config = prepared.model, prepared.config
    batch = worst_batch(prepared.plan, config.data.max_length, prepared.shapes, config.data.packing)
    run = step_runner(config, model, batch, ranks)
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


MANY_TOKENS = {"data": {"max_length": 128}, "train": {"global_batch_size": 4, "micro_batch_size": 2}}


@pytest.mark.parametrize(
    ("checkpointing", "quant"),
    some_in_full([("none", "nf4"), ("full", "nf4"), ("full", "int8")], [("none", "nf4"), ("full", "int8")]),
)
def test_simulated_peak_is_the_real_one(pool: Pool, tiny_model: Path, checkpointing: str, quant: str) -> None:
    train = {**MANY_TOKENS["train"], "activation_checkpointing": checkpointing}
    groups = {"quant": {"name": quant, "double_quant": quant == "nf4"}}
    require_alike(pool, tiny_model, {**MANY_TOKENS, **groups, "train": train})


@pytest.mark.full
def test_simulated_peak_of_waiting_gradients(pool: Pool, tmp_path: Path) -> None:
    """Untied, many heads, two micro-batches a rank, sdpa: gradients of the first wait whole for the second."""
    folder = tiny.make_model(tmp_path / "untied", tie_word_embeddings=False, num_hidden_layers=4)
    groups = {
        "model": {"attn_implementation": "sdpa"},
        "lora": {"r": 32},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    require_alike(pool, folder, groups)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "groups",
    [
        {"quant": {"name": "none"}},
        {"precision": {"name": "fp32"}},
        {"lora": {"r": 8, "dropout": 0.1}},
        {"data": {"max_length": 64, "packing": True}},
        {"fsdp": {"reshard_after_forward": False}},
        {"quant": {"cache_dequantized": "true"}},
        {"quant": {"block_size": 1024, "embeddings": "int8"}},
        {"quant": {"overrides": {"*.down_proj": "int8", "*.0.self_attn.*": "none"}}},
        {"train": {"activation_checkpointing": "selective"}},
        {"data": {"max_length": 1200}, "train": {"global_batch_size": 2, "micro_batch_size": 1}},
        {"debug": {"name": "plain"}},
        {"optim": {"name": "sgd", "lr": 1e-3}},
        {"optim": {"name": "adamw_8bit"}, "lora": {"r": 32}},
        {"optim": {"name": "adafactor"}, "lora": {"r": 32}},
        {"fsdp": {"adapters": "replicated"}},
        {"model": {"add_tokens": ["<|a|>", "<|b|>"]}},
        {"quant": {"name": "none"}, "lora": {"variant": "none"}},
        {"quant": {"name": "none"}, "lora": {"variant": "none"}, "precision": {"name": "fp32"}},
    ],
    ids=str,
)
def test_simulated_peak_of_every_kind_of_run(pool: Pool, tiny_model: Path, ranks: int, groups: dict[str, Any]) -> None:
    require_alike(pool, tiny_model, groups, ranks)


@pytest.mark.full
@pytest.mark.skipif(not gemm._has_product(torch.bfloat16), reason="this CPU multiplies in float32, which takes copies")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_simulated_peak_of_the_embedded_model(pool: Pool, real_model: Path, checkpointing: str) -> None:
    """30 layers: extrapolated from cuts, and compared with the whole on real ranks."""
    groups = {
        "data": {"max_length": 256},
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "activation_checkpointing": checkpointing},
    }
    assert require_alike(pool, real_model, groups) < 0.05
