"""Losses per token of held-out rows, and what lies between two of them: paired bootstraps over rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAWS = 2000
Rows = Sequence[Sequence[float]]
"""For each row the sum of its tokens' losses and their number."""
Gap = tuple[float, float, float]
"""A mean difference and its 95 % interval."""


def mean(rows: Rows) -> float:
    """Return the loss per token of ``[(sum, tokens), ...]``."""
    total = np.asarray(rows, dtype=np.float64).sum(0)
    return float(total[0] / total[1])


def difference(ours: Sequence[Rows], theirs: Sequence[Rows], draws: int = _DRAWS) -> Gap:
    """Return the mean difference of two losses per token and its 95 % interval.

    Rows are drawn with replacement, the same ones for both sides and for all seeds (Efron and Tibshirani, 1993).

    Args:
        ours: for each seed, the rows.
        theirs: the same rows under the other variant.
        draws: number of draws.
    """
    pairs = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in zip(ours, theirs, strict=True)
    ]
    random, count = np.random.default_rng(0), len(pairs[0][0])
    chosen = random.integers(0, count, (draws, count))

    def gap(index: np.ndarray) -> np.ndarray:
        sums = [[side[index].sum(-2) for side in pair] for pair in pairs]
        return np.mean([a[..., 0] / a[..., 1] - b[..., 0] / b[..., 1] for a, b in sums], axis=0)

    low, high = np.quantile(gap(chosen), [0.025, 0.975])
    return float(gap(np.arange(count))), float(low), float(high)
