"""Searches, by arithmetic, for the largest micro-batch and sequence and the cheapest checkpointing and offload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fsdp_qlora.data.deal import BatchPlan
from fsdp_qlora.plan.memory import MemoryModel
from fsdp_qlora.plan.storage import StorageSettings

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
"""(checkpointing, offload), cheapest first; without checkpointing, offload moves everything the layers save."""
MAX_ROWS = 1024
SHORTEST = 256


@dataclass(frozen=True)
class Found:
    """The search result for one combination of checkpointing and offload."""

    checkpointing: str
    offload: str
    fits: bool
    """Whether one row of the requested length fits."""
    micro_batch_size: int
    """Most rows of the requested length, a power of two; 0 if not even one fits."""
    peak_bytes: int
    """Planned peak with that many rows (with one row if none fits)."""
    host_bytes: int
    """Bytes offloaded to host memory at that size."""
    longest: int
    """Longest sequence with one row: a power of two up to the model's limit; 0 if none fits."""
    tokens: int
    """Most tokens in a micro-batch, over rows and lengths that are powers of two and the requested length."""
    tokens_per_second: float | None
    """Estimate with ``micro_batch_size`` rows, if a device was named."""
    tried: int
    """Number of sizes that were tried."""


def search(
    memory: MemoryModel,
    base: StorageSettings,
    batch: BatchPlan,
    budget: int,
    max_positions: int,
    speed: Callable[[StorageSettings, int], float] | None = None,
) -> list[Found]:
    """Return the sizes that fit into ``budget`` bytes of tensors, for each of `SETTINGS`.

    Args:
        memory: the model's bytes.
        base: settings to vary.
        batch: rows per step; the global batch size stays the same unless a micro-batch is larger.
        budget: bytes available for tensors: the device's memory less the reserve.
        max_positions: longest sequence of the model; 0 means the requested length.
        speed: (settings, micro-batches per rank) -> tokens per second.
    """
    possible = [
        (checkpointing, offload)
        for checkpointing, offload in SETTINGS
        if (not base.adapter_copies or offload in ("none", "activations"))
        and (checkpointing == "none" or memory.shapes.recomputes)
    ]
    return [_one(memory, base, batch, budget, max_positions, speed, *setting) for setting in possible]


def best(tried: list[Found]) -> Found | None:
    """Return the first setting that fits, in the order of `SETTINGS`."""
    return next((f for f in tried if f.fits), None)


def fastest(tried: list[Found]) -> Found | None:
    """Return the setting that fits with the most estimated tokens per second, or None."""
    return max((f for f in tried if f.tokens_per_second), key=lambda f: f.tokens_per_second or 0.0, default=None)


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
            cache_dequantized=base.cache_dequantized and checkpointing == "none" and offload in ("none", "params"),
            offload_parameters=offload in ("params", "all"),
            offload_activations=offload in ("activations", "all"),
            accumulation_steps=batch.of_rows(rows).accumulation_steps,
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
    lengths = (asked,) if memory.kept.fixed_length else _powers(SHORTEST, max_positions or asked)
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


def _powers(low: int, high: int) -> list[int]:
    powers = []
    while low <= high:
        powers.append(low)
        low *= 2
    return powers
