"""Products of rows sorted by expert with the experts' matrices on an accelerator: several experts in one operation.

The adapters' products cover all experts at once (`torch.nn.functional.grouped_mm`). Nothing asks the host how many rows
each expert has, if the matrices fit into one group (`Stack.groups`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from fsdp_qlora.quant.gemm import grouped, grouped_outer, padding
from fsdp_qlora.quant.stack import Stack


@dataclass(frozen=True)
class Adapter:
    """Adapters of all experts on one of their weights, with r padded with zeros, as `grouped_mm` needs it."""

    a: Tensor
    """``[count, r, in]``."""
    b: Tensor
    """``[count, out, r]``."""
    r: int
    """Before padding."""
    scaling: float

    @staticmethod
    def of(down: Tensor, up: Tensor, count: int, scaling: float) -> Adapter:
        """Arrange PEFT's A ``[count * r, in]`` and B ``[out, r * count]`` by expert."""
        r = down.shape[0] // count
        more = padding(r, down.dtype)
        a = pad(down.view(count, r, -1), (0, 0, 0, more))
        b = pad(up.view(-1, r, count).permute(2, 0, 1), (0, more)).contiguous()
        return Adapter(a, b, r, scaling)


def product(x: Tensor, stack: Stack, ends: Tensor, counts: list[int], adapter: Adapter | None) -> Tensor:
    """Return the rows of ``x`` times their experts' matrices and adapters, ``[rows, out_features]``.

    Args:
        x: ``[rows, in_features]``, sorted by expert.
        stack: the matrices.
        ends: int32 ``[count]``, where the rows of each expert end.
        counts: number of rows of each expert if the caller knows it, else empty.
        adapter: their adapters.
    """
    out = None
    for group in stack.groups(ends, counts, not stack.multiplies_dense):
        if group.rows is None and not group.single:
            out = grouped(x, stack.whole(group.first, group.last, x.dtype), group.ends)
            continue
        out = x.new_empty(x.shape[0], stack.out_features) if out is None else out
        rows, part = group.of(x), group.of(out)
        if group.single:
            stack.matrix(group.first).apply(rows, part)
        else:
            part.copy_(grouped(rows, stack.whole(group.first, group.last, x.dtype), group.ends))
    out = x.new_empty(x.shape[0], stack.out_features) if out is None else out
    if adapter is not None:
        out.add_(grouped(grouped(x, adapter.a, ends), adapter.b, ends), alpha=adapter.scaling)
    return out


def gradients(
    grad: Tensor, x: Tensor | None, stack: Stack, ends: Tensor, counts: list[int], adapter: Adapter | None,
    wants_x: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of ``x`` (no rows if not wanted), of A and of B, the latter two if there are adapters.

    As in `products._linears_backward`, with each product by groups.
    """
    grad_x = None
    for group in stack.groups(ends, counts, False) if wants_x else ():
        if group.rows is None and not group.single:
            grad_x = grouped(grad, stack.whole(group.first, group.last, grad.dtype).transpose(1, 2), group.ends)
            continue
        grad_x = grad.new_empty(grad.shape[0], stack.in_features) if grad_x is None else grad_x
        rows, part = group.of(grad), group.of(grad_x)
        if group.single:
            stack.matrix(group.first).apply_transposed(rows, out=part)
        else:
            part.copy_(grouped(rows, stack.whole(group.first, group.last, grad.dtype).transpose(1, 2), group.ends))
    grad_x = grad.new_empty(grad.shape[0] if wants_x else 0, stack.in_features) if grad_x is None else grad_x
    if adapter is None or x is None:
        return grad_x, None, None
    grad_low = grouped(grad, adapter.b.transpose(1, 2), ends).mul_(adapter.scaling)
    grad_a = grouped_outer(grad_low, x, ends)[:, : adapter.r]
    grad_b = grouped_outer(grad, grouped(x, adapter.a, ends).mul_(adapter.scaling), ends)[:, :, : adapter.r]
    if wants_x:
        grad_x.add_(grouped(grad_low, adapter.a.transpose(1, 2), ends))
    return grad_x, grad_a, grad_b
