"""`Stack`: stacked frozen matrices ``[count, out_features, in_features]`` as they take part in a grouped product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from fsdp_qlora.quant.formats import Format, QuantizedTensor
from fsdp_qlora.quant.matrix import SLICE_WEIGHTS, WHOLE_WEIGHTS, Matrix
from fsdp_qlora.shapes.linears import LinearShape

GROUP_WEIGHTS = 2**27
"""How many weights of stacked matrices an accelerator dequantizes at a time (256 MiB in bf16)."""


def matrices_at_once(count: int, numel_each: int, on_accelerator: bool) -> int:
    """Return how many of ``count`` stacked matrices are dequantized for one product.

    On an accelerator as many as fit into `GROUP_WEIGHTS`. If that is all of them, nothing asks the host how many rows
    each has. A CPU is its own host, so it takes one at a time, and none that has no rows.
    """
    return max(1, min(count, GROUP_WEIGHTS // numel_each)) if on_accelerator else 1


def dense_at_once(linear: LinearShape, on_accelerator: bool) -> int:
    """Return how many weights of a quantized linear, or of stacked matrices, are dense in a product."""
    size = linear.numel_each
    if size > WHOLE_WEIGHTS:  # dequantized slice by slice, and a slice is freed only once the next one exists
        return min(size, 2 * SLICE_WEIGHTS)
    together = matrices_at_once(linear.count, size, on_accelerator)
    return size * (together + (together > 1))  # one more: each is copied to its place among the others


@dataclass(frozen=True)
class Stack:
    """Stacked matrices, quantized or dense. Nothing here is differentiated: they are frozen."""

    count: int
    out_features: int
    in_features: int
    quantized: QuantizedTensor | None
    """Rows of storage of all matrices, one after the other; ``offset`` has one value for each matrix."""
    quant_format: Format
    dense: torch.Tensor | None = None
    """``[count, out_features, in_features]``, of any strides, if ``quantized`` is None."""

    @property
    def numel_each(self) -> int:
        """Number of weights in each matrix."""
        return self.out_features * self.in_features

    def matrix(self, index: int) -> Matrix:
        """Return matrix ``index``."""
        if self.quantized is None:
            assert self.dense is not None
            return Matrix(self.out_features, self.in_features, None, self.quant_format, self.dense[index])
        each = self.quant_format.num_rows(self.out_features, self.in_features)
        whole, rows = self.quantized, slice(index * each, (index + 1) * each)
        nested = None if whole.nested is None else whole.nested[rows]
        offset = None if whole.offset is None else whole.offset[index]
        part = QuantizedTensor(whole.packed[rows], whole.absmax[rows], nested, offset)
        return Matrix(self.out_features, self.in_features, part, self.quant_format)

    def whole(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Return matrices ``[first, last)``, ``[last - first, out_features, in_features]`` in ``dtype``."""
        if self.dense is not None:
            return self.dense[first:last]
        assert self.quantized is not None
        if last - first == 1:
            return self.matrix(first).whole(dtype)[None]
        shape = last - first, self.out_features, self.in_features
        made = torch.empty(shape, dtype=dtype, device=self.quantized.packed.device)
        for place, index in enumerate(range(first, last)):
            made[place] = self.matrix(index).whole(dtype)
        return made

    def groups(self, ends: torch.Tensor, counts: Sequence[int], by_one: bool) -> Iterator[Group]:
        """Yield the matrices to multiply at a time with the rows of each, leaving out those without rows.

        Args:
            ends: int32 ``[count]``, where the rows of each matrix end.
            counts: the number of rows of each matrix; empty: read from ``ends`` if needed, which waits for the device.
            by_one: whether each matrix must be multiplied on its own.
        """
        on_accelerator = ends.device.type != "cpu"
        size = 1 if by_one else matrices_at_once(self.count, self.numel_each, on_accelerator)
        if self.dense is not None and not by_one:
            size = self.count
        if size == self.count:
            yield Group(0, self.count, None, ends)
            return
        bounds = [0, *(accumulate(counts) if counts else ends.tolist())]
        for first in range(0, self.count, size):
            last = min(first + size, self.count)
            start, stop = bounds[first], bounds[last]
            if stop > start:
                yield Group(first, last, (start, stop), ends[first:last] - start)


@dataclass(frozen=True)
class Group:
    """Matrices ``[first, last)`` of a `Stack` and the rows that are multiplied with them."""

    first: int
    last: int
    rows: tuple[int, int] | None
    """Their rows; None: all."""
    ends: torch.Tensor
    """int32 ``[last - first]``, where the rows of each end, counted from the first of ``rows``."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return its rows of ``x``."""
        return x if self.rows is None else x[self.rows[0] : self.rows[1]]
