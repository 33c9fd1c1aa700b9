"""``fsdp_qlora::experts``: rows sorted by expert times the experts' stacked frozen matrices, with their adapters.

    out[i] = x[i] @ W_e.T + scaling * (x[i] @ A_e.T) @ B_e.T        e: the expert of row i

The counterpart of `quant/products.py` for mixtures of experts. Autograd keeps ``x`` (only for the adapters), where each
expert's rows end, and the packed weights: the dense experts are made for a product, group by group (`Stack.groups`),
and again in backward. The adapters' products cover all experts at once (`torch.nn.functional.grouped_mm`), and the
gradients of an expert without rows are zero.

Adapters are stored as PEFT stores those of ``target_parameters``: A ``[count * r, in]``, expert by expert, and
B ``[out, r * count]``, whose columns are ordered by rank first and expert second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fsdp_qlora.quant.formats import QuantizedTensor, build_format, format_of_key
from fsdp_qlora.quant.gemm import grouped, grouped_outer, padding
from fsdp_qlora.quant.matrix import WHOLE_WEIGHTS
from fsdp_qlora.quant.ops import register
from fsdp_qlora.quant.products import DENSE
from fsdp_qlora.quant.stack import Stack

Spec = tuple[float, int, int, str, int]
"""Scaling, number of matrices, their out_features, the format's key and its block size."""


def _stack(
    in_features: int, packed: Tensor, absmax: list[Tensor], nested: list[Tensor], offset: list[Tensor], count: int,
    out_features: int, name: str, block_size: int,
) -> Stack:  # fmt: skip
    if name == DENSE:
        return Stack(count, out_features, in_features, None, build_format(), packed)
    second = (nested[0], offset[0]) if nested else (None, None)
    quantized = QuantizedTensor(packed, absmax[0], *second)
    return Stack(count, out_features, in_features, quantized, format_of_key(name, bool(nested), block_size))


def _by_one(stack: Stack, forward: bool) -> bool:
    """Whether each matrix is multiplied on its own: a format may have a product of its own, or a matrix be huge."""
    own_product = forward and stack.dense is None and not stack.quant_format.dense_forward
    return own_product or stack.numel_each > WHOLE_WEIGHTS


def _factors(down: Tensor, up: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Return A as ``[count, r, in]``, B as ``[count, out, r]``, both with r padded with zeros, and r."""
    r = down.shape[0] // count
    more = padding(r, down.dtype)
    a = pad(down.view(count, r, -1), (0, 0, 0, more))
    b = pad(up.view(-1, r, count).permute(2, 0, 1), (0, more)).contiguous()
    return a, b, r


def _experts(
    x: Tensor, ends: Tensor, counts: list[int], down: list[Tensor], up: list[Tensor], scaling: float, packed: Tensor,
    absmax: list[Tensor], nested: list[Tensor], offset: list[Tensor], count: int, out_features: int, name: str,
    block_size: int,
) -> Tensor:  # fmt: skip
    stack = _stack(x.shape[1], packed, absmax, nested, offset, count, out_features, name, block_size)
    by_one, out = _by_one(stack, True), None
    for group in stack.groups(ends, counts, by_one):
        rows = group.of(x)
        if group.last - group.first == 1:
            part = stack.matrix(group.first).apply(rows)
        else:
            part = grouped(rows, stack.whole(group.first, group.last, x.dtype), group.ends)
        if group.rows is None:
            out = part
        else:
            out = x.new_empty(x.shape[0], out_features) if out is None else out
            group.of(out).copy_(part)
    out = x.new_empty(x.shape[0], out_features) if out is None else out
    if down:
        a, b, _ = _factors(down[0], up[0], count)
        out.add_(grouped(grouped(x, a, ends), b, ends), alpha=scaling)
    return out


def _experts_backward(
    grad: Tensor, x: Tensor | None, ends: Tensor, counts: list[int], down: list[Tensor], up: list[Tensor],
    scaling: float, packed: Tensor, absmax: list[Tensor], nested: list[Tensor], offset: list[Tensor], count: int,
    in_features: int, name: str, block_size: int, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Return the gradients of x (empty if not wanted), of A and of B. Without adapters ``x`` is None.

    As in `products._linears_backward`, with each product by groups.
    """
    grad = grad.contiguous()
    grad_x = grad.new_empty(grad.shape[0] if wants_x else 0, in_features)
    if wants_x:
        stack = _stack(in_features, packed, absmax, nested, offset, count, grad.shape[1], name, block_size)
        for group in stack.groups(ends, counts, _by_one(stack, False)):
            rows = group.of(grad)
            if group.last - group.first == 1:
                part = stack.matrix(group.first).apply_transposed(rows)
            else:
                part = grouped(rows, stack.whole(group.first, group.last, grad.dtype).transpose(1, 2), group.ends)
            if group.rows is None:
                grad_x = part
            else:
                group.of(grad_x).copy_(part)
    if x is None:
        return grad_x, [], []
    a, b, r = _factors(down[0], up[0], count)
    grad_low = grouped(grad, b.transpose(1, 2), ends).mul_(scaling)
    grad_a = grouped_outer(grad_low, x, ends)[:, :r]
    grad_b = grouped_outer(grad, grouped(x, a, ends).mul_(scaling), ends)[:, :, :r]
    if wants_x:
        grad_x.add_(grouped(grad_low, a.transpose(1, 2), ends))
    return grad_x, [grad_a.reshape(count * r, -1)], [grad_b.permute(1, 2, 0).reshape(-1, r * count).contiguous()]


class _Experts(torch.autograd.Function):
    """`grouped_product` with its gradients. After ``ends`` come A and B if there are any, then frozen tensors."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, counts: list[int], num_adapters: int, x: Tensor, ends: Tensor, *rest: Tensor
    ) -> Tensor:
        # As in `products._Linears`: FSDP frees and refills what is saved here, and float32 adapters are not copied.
        ctx.save_for_backward(ends, *([x] if num_adapters else []), *rest)
        ctx.spec, ctx.counts, ctx.num_adapters = spec, counts, num_adapters
        ctx.in_features, ctx.dtype = x.shape[1], x.dtype
        scaling, count, out_features, name, block_size = spec
        adapters, frozen = _split(rest, num_adapters, x.dtype)
        return ops.experts(x, ends, counts, *adapters, scaling, *frozen, count, out_features, name, block_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaling, count, _, name, block_size = ctx.spec
        ends, *rest = ctx.saved_tensors  # read once: checkpointing forbids a second access
        x = rest.pop(0) if ctx.num_adapters else None
        adapters, frozen = _split(rest, ctx.num_adapters, ctx.dtype)
        wants_x = ctx.needs_input_grad[3]
        grad_x, grad_down, grad_up = ops.experts_backward(
            grads[0], x, ends, ctx.counts, *adapters, scaling, *frozen, count, ctx.in_features, name, block_size,
            wants_x,
        )  # fmt: skip
        trained = [
            grad.to(own.dtype) for grad, own in zip((*grad_down, *grad_up), rest[: 2 * ctx.num_adapters], strict=True)
        ]
        unused = [None] * (len(rest) - len(trained))
        return None, None, None, grad_x if wants_x else None, None, *trained, *unused


def _split(rest: Any, num_adapters: int, dtype: torch.dtype) -> tuple[list[list[Tensor]], list[Any]]:
    """Return ``[down, up]`` in ``dtype`` and ``[packed, absmax, nested, offset]``, each but packed a list of 0 or 1."""
    down, up = rest[:num_adapters], rest[num_adapters : 2 * num_adapters]
    packed, *statistics = rest[2 * num_adapters :]
    lists = [list(statistics[i : i + 1]) for i in range(3)]
    return [[t.to(dtype) for t in down], [t.to(dtype) for t in up]], [packed, *lists]


def grouped_product(
    x: Tensor, stack: Stack, ends: Tensor, counts: list[int], adapter: tuple[Tensor, Tensor, float] | None = None
) -> Tensor:
    """Return the rows of ``x``, sorted by matrix, times the matrix of each, ``[rows, out_features]``.

    Args:
        x: ``[rows, in_features]``.
        stack: the matrices.
        ends: int32 ``[stack.count]``, where the rows of each matrix end; the last must be the number of rows.
        counts: number of rows of each matrix if the caller knows it, else empty.
        adapter: A ``[count * r, in_features]``, B ``[out_features, r * count]`` and the factor of their product; A and
            B are cast to ``x``'s dtype.
    """
    if stack.quantized is None:
        assert stack.dense is not None
        frozen, name, block_size = [stack.dense], DENSE, 0
    else:
        q, form = stack.quantized, stack.quant_format
        frozen = [t for t in (q.packed, q.absmax, q.nested, q.offset) if t is not None]
        name, block_size = form.key, form.block_size
    *factors, scaling = adapter or (1.0,)
    spec = (scaling, stack.count, stack.out_features, name, block_size)
    return _Experts.apply(spec, counts, len(factors) // 2, x, ends, *factors, *frozen)  # type: ignore[return-value]


def _dense_stack(
    packed: Tensor, absmax: Tensor, nested: list[Tensor], offset: list[Tensor], count: int, out_features: int,
    in_features: int, name: str, block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    stack = _stack(in_features, packed, [absmax], nested, offset, count, out_features, name, block_size)
    return stack.whole(0, count, dtype)


def densify_stack(stack: Stack, dtype: torch.dtype) -> Stack:
    """Return ``stack`` dequantized to ``dtype``, so that backward need not dequantize it again."""
    q, form = stack.quantized, stack.quant_format
    assert q is not None
    nested, offset = ([] if t is None else [t] for t in (q.nested, q.offset))
    dense = ops.dense_stack(
        q.packed, q.absmax, nested, offset, stack.count, stack.out_features, stack.in_features, form.key,
        form.block_size, dtype,
    )  # fmt: skip
    return Stack(stack.count, stack.out_features, stack.in_features, None, form, dense)


def _fake_experts(
    x: Tensor, ends: Any, counts: Any, down: Any, up: Any, scaling: Any, packed: Any, absmax: Any, nested: Any,
    offset: Any, count: Any, out_features: int, name: Any, block_size: Any,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out_features)


def _fake_experts_backward(
    grad: Tensor, x: Any, ends: Any, counts: Any, down: list[Tensor], up: list[Tensor], scaling: Any, packed: Any,
    absmax: Any, nested: Any, offset: Any, count: Any, in_features: int, name: Any, block_size: Any, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    grad_x = grad.new_empty(grad.shape[0] if wants_x else 0, in_features)
    return grad_x, [a.new_empty(a.shape) for a in down], [b.new_empty(b.shape) for b in up]


def _fake_dense_stack(
    packed: Tensor, absmax: Any, nested: Any, offset: Any, count: int, out_features: int, in_features: int, name: Any,
    block_size: Any, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty(count, out_features, in_features, dtype=dtype)


ops = torch.ops.fsdp_qlora
BODIES: dict[Any, Callable[..., Any]] = register(
    {"experts": (_experts, _fake_experts), "experts_backward": (_experts_backward, _fake_experts_backward),
     "dense_stack": (_dense_stack, _fake_dense_stack)}
)  # fmt: skip
"""The functions behind the ops, by op; simulated steps call them directly."""
