"""What one rank of a benchmark runs: its way, model, rows and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.step_rows import Rows
from fsdp_qlora.distributed.process import Placement

Stepper = Callable[[], None]
"""Trains one step."""
Known = dict[str, Any]
"""What a way knows about itself once it is built: ours knows its plan."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Spec:
    """What one rank of a benchmark runs."""

    way: str
    """A key of `benchmarks.step_ways.WAYS`."""
    model: str
    """Folder of the model."""
    rows: str
    """File of the batches, see `benchmarks.step_rows`."""
    r: int = 16
    checkpointing: bool = False
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of ours: settings by group."""
    attention: str = "sdpa"
    """Of the bare loop."""
    batch: int = 1
    """Rows of a rank's step."""
    fsdp: bool = False
    """Of TRL: shard by accelerate's FSDP2, which takes an accelerator."""
    drawn: bool = False
    """Whether the model's weights are drawn (`benchmarks.drawn`) instead of read."""


def plain_loop(
    trained: Sequence[torch.nn.Parameter], rows: Rows, spec: Spec, placement: Placement,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Stepper:  # fmt: skip
    """Return a step as one writes it by hand: ``loss`` of input_ids and labels, backward, clipping, torch's AdamW."""
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    number = 0

    def step() -> None:
        nonlocal number
        ids, labels = rows.of(number, placement.rank, placement.world_size, spec.batch)
        number += 1
        loss(ids, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
