"""`Matrix`: one frozen matrix ``[out_features, in_features]`` as it takes part in a product, quantized or dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch

from fsdp_qlora.quant.formats import Format, QuantizedTensor, dequantize
from fsdp_qlora.quant.gemm import add_product, matmul, product_into


@dataclass(frozen=True)
class Matrix:
    """A matrix and its products. Nothing here is differentiated: the matrix is frozen."""

    out_features: int
    in_features: int
    quantized: QuantizedTensor | None
    quant_format: Format
    dense: torch.Tensor | None = None
    """``[out_features, in_features]`` if already dequantized; ``quantized`` is then None."""

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows ``[start, stop)`` in ``dtype``; ``start`` must begin a packed row, see `slices`."""
        if self.quantized is None:
            assert self.dense is not None
            return self.dense[start:stop]
        whole, part = self.quantized, self.quantized
        if (start, stop) != (0, self.out_features):
            first = start * self.in_features // self._row_weights
            rows = slice(first, first + self.quant_format.num_rows(stop - start, self.in_features))
            nested = None if whole.nested is None else whole.nested[rows]
            part = QuantizedTensor(whole.packed[rows], whole.absmax[rows], nested, whole.offset)
        return dequantize(part, self.quant_format, (stop - start, self.in_features), dtype)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole matrix in ``dtype``."""
        return self.rows(0, self.out_features, dtype)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of slices of rows, each starting at the beginning of a packed row."""
        # `step` matrix rows are the fewest that fill whole packed rows: lcm(row weights, in_features) / in_features
        step = self._row_weights // gcd(self._row_weights, self.in_features)
        size = max(step, SLICE_WEIGHTS // self.in_features // step * step)
        for start in range(0, self.out_features, size):
            yield start, min(start + size, self.out_features)

    @property
    def _row_weights(self) -> int:
        return self.quant_format.row_weights(self.in_features)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the row ranges to dequantize at a time: the whole matrix, or the `slices` of a very large one."""
        if self.out_features * self.in_features <= WHOLE_WEIGHTS:
            yield 0, self.out_features
        else:
            yield from self.slices()

    def apply(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x @ matrix.T``: ``[tokens, in_features]`` -> ``[tokens, out_features]``, in ``out`` if given."""
        if self.quantized is not None and (product := self.quant_format.multiply(x, self.quantized)) is not None:
            return product if out is None else out.copy_(product)
        pieces = list(self._pieces())
        if len(pieces) == 1:
            return _product(x, self.whole(x.dtype).t(), out)
        out = x.new_empty(x.shape[0], self.out_features) if out is None else out
        for start, stop in pieces:
            out[:, start:stop] = matmul(x, self.rows(start, stop, x.dtype).t())
        return out

    def apply_transposed(
        self, grad: torch.Tensor, into: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``grad @ matrix`` ``[tokens, in_features]``, added to ``into`` in place or in ``out`` if given."""
        for start, stop in self._pieces():
            part, dense = grad[:, start:stop], self.rows(start, stop, grad.dtype)
            into = _product(part, dense, out) if into is None else add_product(into, part, dense)
        assert into is not None
        return into


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return matmul(a, b) if out is None else product_into(out, a, b)


SLICE_WEIGHTS = 2**26
"""How many weights of a quantized head or very large linear are dense at a time (128 MiB in bf16)."""
WHOLE_WEIGHTS = 2**28
"""Linears of up to this many weights (512 MiB in bf16) are dequantized whole; larger ones slice by slice."""
