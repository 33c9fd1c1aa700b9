"""`prepare data.report=true`: statistics of the data, with a text histogram."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from fsdp_qlora.data.pack import best_fit_decreasing

_BINS, _BAR = 12, 40


@dataclass(frozen=True)
class Histogram:
    """Sequence lengths in bins of equal width."""

    edges: list[int]
    counts: list[int]

    def lines(self) -> list[str]:
        """Return one line per bin: from, to, count, bar."""
        top = max(self.counts, default=1) or 1
        pairs = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        return [f"{a:>7} - {b - 1:<7} {n:>9}  {'█' * ceil(_BAR * n / top) if n else ''}" for a, b, n in pairs]


def histogram(lengths: np.ndarray) -> Histogram:
    """Return the histogram of lengths from 1 to the longest."""
    width = max(1, ceil(int(lengths.max()) / _BINS))
    edges = list(range(1, int(lengths.max()) + width + 1, width))
    counts, _ = np.histogram(lengths, bins=edges)
    return Histogram(edges, counts.tolist())


def packing_efficiency(lengths: np.ndarray, capacity: int) -> tuple[int, float]:
    """Return how many packed sequences the rows would make, and the fraction of their capacity that would be used."""
    num = len(best_fit_decreasing(lengths, capacity))
    return num, float(lengths.sum()) / (num * capacity)
