"""The largest micro-batch and sequence, and the cheapest checkpointing and offload, that fit: by arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fsdp_qlora.data.deal import BatchPlan
from fsdp_qlora.plan.memory import MemoryModel, StorageSettings

SETTINGS = (
    ("none", "none"),
    ("selective", "none"),
    ("full", "none"),
    ("full", "activations"),
    ("none", "activations"),
    ("none", "params"),
    ("full", "params"),
    ("full", "all"),
    ("none", "all"),
)
"""(checkpointing, offload), cheapest first; without checkpointing, offload moves all that layers save."""
MAX_ROWS = 1024
SHORTEST = 256


@dataclass(frozen=True)
class Found:
    """What fits with one setting of checkpointing and offload."""

    checkpointing: str
    offload: str
    fits: bool
    """Whether one row of the length asked for fits."""
    micro_batch_size: int
    """Most rows of the length asked for, a power of two; 0 = not one."""
    peak_bytes: int
    """Planned peak with that many rows (or with one that does not fit)."""
    host_bytes: int
    """Offloaded to host memory then."""
    longest: int
    """Longest sequence of one row: a power of two up to the model's own limit, 0 = none."""
    tokens: int
    """Most tokens of a micro-batch, rows and lengths both powers of two."""
    tokens_per_second: float | None
    """Estimate with ``micro_batch_size`` rows, if a device was named."""
    tried: int
    """Micro-batches that were planned."""


def search(
    memory: MemoryModel,
    base: StorageSettings,
    batch: BatchPlan,
    budget: int,
    max_positions: int,
    speed: Callable[[StorageSettings, int], float] | None = None,
) -> list[Found]:
    """Return what fits into ``budget`` bytes of tensors for each of `SETTINGS`.

    Args:
        memory: the model's bytes.
        base: settings to vary.
        batch: rows of a step; the global batch stays, and grows only where one micro-batch is larger.
        budget: bytes that tensors may take: the device's memory less the reserve.
        max_positions: longest sequence of the model; 0 = the length asked for.
        speed: (settings, micro-batches of a rank) -> tokens a second.
    """
    possible = [s for s in SETTINGS if not base.adapter_copies or s[1] in ("none", "activations")]
    return [_one(memory, base, batch, budget, max_positions, speed, *setting) for setting in possible]


def best(found: list[Found]) -> Found | None:
    """Return the first setting that fits, in the order of `SETTINGS`."""
    return next((f for f in found if f.fits), None)


def fastest(found: list[Found]) -> Found | None:
    """Return the setting that fits with most tokens a second by the estimate, if there is one."""
    return max((f for f in found if f.tokens_per_second), key=lambda f: f.tokens_per_second or 0.0, default=None)


def _one(
    memory: MemoryModel,
    base: StorageSettings,
    batch: BatchPlan,
    budget: int,
    max_positions: int,
    speed: Callable[[StorageSettings, int], float] | None,
    checkpointing: str,
    offload: str,
) -> Found:
    tried = 0

    def settings_of(rows: int, length: int) -> StorageSettings:
        return replace(
            base,
            micro_batch_size=rows,
            max_length=length,
            checkpointing=checkpointing,
            cache_dequantized=base.cache_dequantized and checkpointing == "none",
            offload_parameters=offload in ("params", "all"),
            offload_activations=offload in ("activations", "all"),
            accumulation_steps=_turns(batch, rows),
        )

    def peak(rows: int, length: int) -> int:
        nonlocal tried
        tried += 1
        return memory.plan(settings_of(rows, length)).peak

    def most_rows(length: int) -> int:
        rows = 0
        while rows < MAX_ROWS and peak(max(1, 2 * rows), length) <= budget:
            rows = max(1, 2 * rows)
        return rows

    asked = base.max_length
    rows = most_rows(asked)
    lengths = _powers(SHORTEST, max_positions or asked)
    by_length = {length: most_rows(length) for length in lengths}
    chosen = settings_of(max(1, rows), asked)
    planned = memory.plan(chosen)
    return Found(
        checkpointing=checkpointing,
        offload=offload,
        fits=rows > 0,
        micro_batch_size=rows,
        peak_bytes=planned.peak,
        host_bytes=planned.host.offloaded_parameters + planned.host.offloaded_activations,
        longest=max((length for length, n in by_length.items() if n), default=0),
        tokens=max([n * length for length, n in by_length.items()] + [rows * asked]),
        tokens_per_second=speed(chosen, chosen.accumulation_steps) if speed and rows else None,
        tried=tried,
    )


def _turns(batch: BatchPlan, rows: int) -> int:
    return replace(
        batch, micro_batch_size=rows, global_batch_size=max(rows, batch.global_batch_size)
    ).accumulation_steps


def _powers(low: int, high: int) -> list[int]:
    found = []
    while low <= high:
        found.append(low)
        low *= 2
    return found
