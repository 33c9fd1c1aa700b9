"""Products of rows sorted by expert with the experts' matrices on a CPU: expert by expert, each in the CPU's caches.

oneDNN compiles a product for each number of rows (0.2 to 0.8 ms) and keeps the last few, and experts get another number
of rows in each micro-batch. So each expert's run of rows is *widened* to a multiple of `STEP`: what is computed for the
first rows of the next expert is overwritten by that expert's own product, which comes later. Sums over rows leave them
out.

    rows of expert 0 | rows of expert 1     | ...
    product of 0 --------->|                           widened
                     | product of 1 ------------->|    overwrites
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fsdp_qlora.quant.gemm import add_product, matmul, product_into
from fsdp_qlora.quant.stack import Stack

STEP = 32
"""Runs have a multiple of this many rows, shorter ones of half as many. Larger multiples waste more products."""


@dataclass(frozen=True)
class Adapter:
    """Adapters of all experts on one of their weights."""

    a: Tensor
    """``[count, r, in]``."""
    b: Tensor
    """Transposed, ``[count, r, out]``."""
    scaling: float

    @staticmethod
    def of(down: Tensor, up: Tensor, count: int, scaling: float) -> Adapter:
        """Arrange PEFT's A ``[count * r, in]`` and B ``[out, r * count]`` by expert."""
        r = down.shape[0] // count
        return Adapter(down.view(count, r, -1), up.view(-1, r, count).permute(2, 1, 0).contiguous(), scaling)


@dataclass(frozen=True)
class _Run:
    """The rows ``[start, stop)`` of expert ``index``; ``[start, wide)`` when widened."""

    index: int
    start: int
    stop: int
    wide: int

    def of(self, x: Tensor) -> Tensor:
        return x[self.start : self.wide]

    def only(self, x: Tensor) -> Tensor:
        """Zero the rows of ``x`` ``[wide - start, n]`` that are not the expert's; return it."""
        if self.wide > self.stop:
            x[self.stop - self.start :].zero_()
        return x


def _runs(bounds: Sequence[int], widen: bool) -> Iterator[_Run]:
    """Yield the runs of the experts that have rows; ``bounds`` are where the rows of each begin, and the end."""
    for index, (start, stop) in enumerate(pairwise(bounds)):
        step = STEP if stop - start > STEP else STEP // 2
        wide = start - (start - stop) // step * step if widen else stop
        if stop > start:
            yield _Run(index, start, stop, min(wide, bounds[-1]))


def product(x: Tensor, stack: Stack, bounds: Sequence[int], adapter: Adapter | None) -> Tensor:
    """Return the rows of ``x`` times their experts' matrices and adapters, ``[rows, out_features]``.

    Args:
        x: ``[rows, in_features]``, sorted by expert.
        stack: the matrices.
        bounds: where the rows of each expert begin, and the number of rows.
        adapter: their adapters.
    """
    out = x.new_empty(x.shape[0], stack.out_features)
    # int8 multiplies by itself, and with a threshold looks at all rows that it is given
    for run in _runs(bounds, widen=stack.multiplies_dense):
        rows, part = run.of(x), run.of(out)
        stack.matrix(run.index).apply(rows, part)
        if adapter is not None:
            low = matmul(rows, adapter.a[run.index].t())
            add_product(part, low, adapter.b[run.index], alpha=adapter.scaling)
    return out


def gradients(
    grad: Tensor, x: Tensor | None, stack: Stack, bounds: Sequence[int], adapter: Adapter | None, wants_x: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of ``x`` (no rows if not wanted), and of A and B as in `Adapter` if there are adapters."""
    grad_x = grad.new_empty(grad.shape[0] if wants_x else 0, stack.in_features)
    grad_a = grad_b = None
    if adapter is not None:
        grad_a, grad_b = torch.zeros_like(adapter.a), torch.zeros_like(adapter.b)
    for run in _runs(bounds, widen=True):
        rows = run.of(grad)
        if wants_x:
            stack.matrix(run.index).apply_transposed(rows, out=run.of(grad_x))
        if adapter is None or x is None or grad_a is None or grad_b is None:
            continue
        a, b, inputs = adapter.a[run.index], adapter.b[run.index], run.of(x)
        grad_low = matmul(rows, b.t()).mul_(adapter.scaling)
        if wants_x:
            add_product(run.of(grad_x), grad_low, a)
        product_into(grad_a[run.index], run.only(grad_low).t(), inputs)
        low = run.only(matmul(inputs, a.t()).mul_(adapter.scaling))
        product_into(grad_b[run.index], low.t(), rows)
    return grad_x, grad_a, grad_b
