"""The base's weights as they are read, and a weight minus a product of low rank, slice by slice.

The product's bits must not depend on which slice a rank reads. So it is made in tiles of whole rows that begin at fixed
rows: the same multiplication of the same operands on every rank. Call it on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_qlora.quant.formats import Format
from fsdp_qlora.quant.packing import CHUNK_WEIGHTS

Read = Callable[[int, int], torch.Tensor]
"""Called with ``(start, stop)``; returns those elements of a flattened weight, in their own dtype."""


@dataclass(frozen=True)
class LowRank:
    """A matrix ``left @ right``, float32."""

    left: torch.Tensor
    """``[rows, r]``."""
    right: torch.Tensor
    """``[r, columns]``."""

    @property
    def tile_rows(self) -> int:
        """Rows that are multiplied at a time."""
        return max(1, CHUNK_WEIGHTS // self.right.shape[1])

    def tile(self, number: int) -> torch.Tensor:
        """Return tile ``number``, float32 ``[tile_rows, columns]`` (fewer rows at the end)."""
        start = number * self.tile_rows
        return self.left[start : start + self.tile_rows] @ self.right

    def on(self, device: torch.device) -> LowRank:
        """Return it on a device."""
        return LowRank(self.left.to(device), self.right.to(device))

    def transposed(self) -> LowRank:
        """Return the transposed matrix."""
        return LowRank(self.right.t().contiguous(), self.left.t().contiguous())


@dataclass(frozen=True)
class BaseWeight:
    """A weight of the base while it is loaded."""

    module: nn.Module
    """The module that computes with it."""
    read: Read
    shape: tuple[int, int]
    """``(out_features, in_features)``."""
    transposed: bool
    """Whether ``read`` sees it as ``[in_features, out_features]`` (Conv1D)."""
    quant_format: Format | None
    """How it is stored; None in 16 or 32 bits."""
    packed: bool = False
    """Whether the files hold it in 4 bits, so that ``read`` dequantizes it."""
    as_stored: bool = True
    """Whether the files hold its values; False if ``read`` computes others from them."""

    def whole(self, device: torch.device) -> torch.Tensor:
        """Return it, float32 ``[out_features, in_features]``; beside it, only a bounded piece is in memory."""
        numel = self.shape[0] * self.shape[1]
        flat = torch.empty(numel, dtype=torch.float32, device=device)
        for start in range(0, numel, CHUNK_WEIGHTS):
            stop = min(start + CHUNK_WEIGHTS, numel)
            flat[start:stop] = self.read(start, stop)
        return flat.view(self.shape[::-1]).t().contiguous() if self.transposed else flat.view(self.shape)


def less(read: Read, taken: LowRank, device: torch.device) -> Read:
    """Return a reader of the weight that ``read`` reads minus ``taken``, float32 on ``device``."""
    columns = taken.right.shape[1]
    size = taken.tile_rows * columns
    last: tuple[int, torch.Tensor] | None = None

    def read_less(start: int, stop: int) -> torch.Tensor:
        nonlocal last
        values = read(start, stop).to(device, torch.float32, copy=True)
        for number in range(start // size, -(-stop // size) if stop > start else 0):
            if last is None or last[0] != number:  # slices often end inside a tile
                last = number, taken.tile(number).view(-1)
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            values[low - start : high - start] -= last[1][low - number * size : high - number * size]
        return values

    return read_less


def minus(weight: torch.Tensor, taken: LowRank) -> torch.Tensor:
    """Return ``weight - taken``, float32 ``[rows, columns]``, with the bits that `less` reads."""
    left = weight.clone()
    for number in range(-(-weight.shape[0] // taken.tile_rows)):
        rows = slice(number * taken.tile_rows, (number + 1) * taken.tile_rows)
        left[rows] -= taken.tile(number)
    return left
