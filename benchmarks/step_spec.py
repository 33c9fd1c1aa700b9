"""What one rank of a benchmark runs: its way, model, rows and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
