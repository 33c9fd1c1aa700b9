"""What layers of upstream's code take for a row, found by running them on meta (`fsdp_qlora.model.runs`).

Numbers only; no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ByLength:
    """A number that depends on the length of a row: a polynomial of second degree, as attention's scores are."""

    fixed: float
    linear: float = 0.0
    square: float = 0.0

    @staticmethod
    def through(points: Sequence[tuple[int, int]]) -> ByLength:
        """Return what has the second number of each pair at the length that is its first: one pair, or three."""
        if len(points) == 1:
            return ByLength(points[0][1])
        (a, first), (b, second), (c, third) = points
        slope, next_slope = (second - first) / (b - a), (third - second) / (c - b)
        square = (next_slope - slope) / (c - a)
        linear = slope - square * (a + b)
        return ByLength(first - linear * a - square * a**2, linear, square)

    def at(self, length: int) -> int:
        """Return the number for rows of ``length``."""
        return round(self.fixed + self.linear * length + self.square * length**2)


@dataclass(frozen=True)
class LayerRun:
    """Bytes that one layer takes for a row, in the dtype that the model was built with."""

    tokens: ByLength
    """Number of tokens that pass through it: of an encoder-decoder's decoder, those of the target."""
    enters: ByLength
    """Its input."""
    tensors: tuple[ByLength, ...]
    """Each tensor that it keeps from forward to backward, whatever is adapted in it."""
    inputs: Mapping[str, tuple[int, ByLength]]
    """Linear -> the number of its input, the same for those that read the same one, and its bytes: what an adapter
    keeps. Linears whose input is among ``tensors`` are left out."""
    products: ByLength
    """What its linears compute."""
    transient: ByLength
    """What backward needs at its peak on top of all that is kept."""
    calls: int = 1
    """How often it is called for a row."""
    shared: ByLength = ByLength(0)
    """What it makes for later layers beside its output, so that it is kept even if layers are recomputed: T5's biases
    of positions."""
