"""How exact numbers are, by the names of the promises in docs/numerics.md: relative differences."""

from __future__ import annotations

from collections.abc import Sequence

FP32_LOSSES, FP32_NORMS = 1e-5, 1e-4
"""Another number of ranks, in float32."""
BF16_FIRST_LOSS, BF16_LOSSES, BF16_MEAN_LOSS = 1e-6, 5e-3, 1.5e-3
"""Another number of ranks, in bfloat16: the first loss, each, and the mean difference."""
UPSTREAM_FIRST_LOSS, UPSTREAM_LOSSES = 3e-3, 1e-2
"""Beside transformers + bitsandbytes + PEFT, in bfloat16."""


def apart(found: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Return the relative difference of each number."""
    assert len(wanted) > 0
    return [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]


def close(found: Sequence[float], wanted: Sequence[float], limit: float) -> bool:
    """Whether each number is within ``limit`` of its counterpart."""
    return max(apart(found, wanted)) <= limit
