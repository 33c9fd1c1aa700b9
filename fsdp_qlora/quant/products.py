"""``fsdp_qlora::linears``: one input times several frozen matrices, each with its low-rank adapter, as one torch op.

    out_i = x @ W_i.T + scaling_i * (x @ A_i.T) @ B_i.T

(QLoRA, Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, equation 5.) Compared with separate modules:

- backward needs only ``x``, saved once for all matrices; the low-rank product is recomputed, which is almost free;
- the A of all matrices are stacked, so ``x @ A.T`` is one product, and so is the adapters' part of ``x``'s gradient;
- ``addmm`` adds the low-rank part to the base's product, and sums the gradients of ``x``: no separate pass over
  activations for the addition;
- frozen weights get no gradient, and ``x`` gets one only if something before it is trained.

As an op it is opaque to `torch.compile` and selective checkpointing; a fake implementation gives the shapes. Simulated
steps run `BODIES` instead, because the dense weights inside dominate a step's memory.

An int8 base multiplies in 8 bits (`Format.multiply`). As in bitsandbytes, the gradient of ``x`` uses the dequantized
weight, regardless of how forward rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.quant.formats import QuantizedTensor, build_format, format_of_key
from fsdp_qlora.quant.gemm import add_product, matmul
from fsdp_qlora.quant.matrix import Matrix
from fsdp_qlora.quant.ops import register

DENSE = "dense"
"""Format name of matrices that are already dense: ``packed`` holds the matrices, and there are no statistics."""


def _matrices(
    in_features: int, out_features: Sequence[int], packed: Sequence[Tensor], absmax: Sequence[Tensor],
    nested: Sequence[Tensor], offset: Sequence[Tensor], name: str, block_size: int,
) -> list[Matrix]:  # fmt: skip
    if name == DENSE:
        return [
            Matrix(out, in_features, None, build_format(), dense)
            for out, dense in zip(out_features, packed, strict=True)
        ]
    quant_format = format_of_key(name, bool(nested), block_size)
    matrices = []
    for i, out in enumerate(out_features):
        second = (nested[i], offset[i]) if nested else (None, None)
        matrices.append(Matrix(out, in_features, QuantizedTensor(packed[i], absmax[i], *second), quant_format))
    return matrices


def _linears(
    x: Tensor, down: list[Tensor], up: list[Tensor], scalings: list[float], packed: list[Tensor], absmax: list[Tensor],
    nested: list[Tensor], offset: list[Tensor], out_features: list[int], name: str, block_size: int,
) -> list[Tensor]:  # fmt: skip
    flat = x.reshape(-1, x.shape[-1])
    matrices = _matrices(flat.shape[1], out_features, packed, absmax, nested, offset, name, block_size)
    outs = [matrix.apply(flat) for matrix in matrices]
    if down:
        low = matmul(flat, _stack(down).t()).split([a.shape[0] for a in down], dim=1)
        for out, part, b, scaling in zip(outs, low, up, scalings, strict=True):
            add_product(out, part, b.t(), scaling)
    # not views: upstream may modify a product in place (clip_qkv, parallel layers), which autograd forbids for views
    return [torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[1])) for out in outs]


def _linears_backward(
    grads: list[Tensor | None], x: Tensor | None, down: list[Tensor], up: list[Tensor], scalings: list[float],
    packed: list[Tensor], absmax: list[Tensor], nested: list[Tensor], offset: list[Tensor], out_features: list[int],
    in_features: int, name: str, block_size: int, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Return the gradients of x (empty if not wanted), of each A and of each B. Without adapters ``x`` is None.

    With ``low = x @ A.T`` and ``grad_low = scaling * grad @ B``: ``grad_B = scaling * grad.T @ low``,
    ``grad_A = grad_low.T @ x``, and ``grad_x`` is the sum of ``grad @ W + grad_low @ A`` over the matrices.
    """
    used = next(g for g in grads if g is not None)  # None: nothing used that output
    shape = (*used.shape[:-1], in_features)
    flat_grads = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
    grad_x = None
    if wants_x:
        matrices = _matrices(in_features, out_features, packed, absmax, nested, offset, name, block_size)
        for matrix, grad in zip(matrices, flat_grads, strict=True):
            if grad is not None:
                grad_x = matrix.apply_transposed(grad, grad_x)
    if x is None:
        return used.new_empty(0) if grad_x is None else grad_x.view(shape), [], []
    flat = x.reshape(-1, in_features)
    ranks, stacked = [a.shape[0] for a in down], _stack(down)
    low = matmul(flat, stacked.t()).split(ranks, dim=1)
    grad_low = flat.new_zeros(flat.shape[0], sum(ranks))
    grad_up = []
    for grad, part, into, b, scaling in zip(flat_grads, low, grad_low.split(ranks, dim=1), up, scalings, strict=True):
        if grad is None:
            grad_up.append(torch.zeros_like(b))
            continue
        into.copy_(matmul(grad, b)).mul_(scaling)
        grad_up.append(matmul(grad.t(), part).mul_(scaling))
    grad_down = matmul(grad_low.t(), flat).split(ranks)
    if grad_x is not None:
        add_product(grad_x, grad_low, stacked)
    return flat.new_empty(0) if grad_x is None else grad_x.view(shape), [g.clone() for g in grad_down], grad_up


def _stack(down: list[Tensor]) -> Tensor:
    return down[0] if len(down) == 1 else torch.cat(down)


class _Linears(torch.autograd.Function):
    """`linears` with its gradients; an `autograd.Function`, because `torch.library.register_autograd` is slow on lists.

    autograd tracks only tensors passed as arguments, not those inside lists, so the six lists are passed flat:

        apply(spec, x, *down, *up, *packed, *absmax, *nested, *offset)
              |        '-- A, B -' '----- frozen, no gradient ------'
              '- scalings, lengths of the six lists, out_features, format, block size

    `_cut` makes lists of them again. Without adapters ``down`` and ``up`` are empty and ``x`` is not saved.
    """

    @staticmethod
    def forward(ctx: Any, spec: tuple[Any, ...], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        scalings, lengths, out_features, name, block_size = spec
        # FSDP frees and refills the storage of gathered parameters, so saving them takes no memory between the passes.
        # Unsharded adapters are saved as they are, in float32: copies in x's dtype would live until backward.
        ctx.save_for_backward(*([x] if lengths[0] else []), *rest)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.in_features, ctx.dtype = spec, x.shape[-1], x.dtype
        down, up, *frozen = _cut(rest, lengths)
        low = _as(down, x.dtype), _as(up, x.dtype)
        return tuple(ops.linears(x, *low, scalings, *frozen, out_features, name, block_size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scalings, lengths, out_features, name, block_size = ctx.spec
        saved = list(ctx.saved_tensors)  # read once: checkpointing forbids a second access
        x = saved.pop(0) if lengths[0] else None
        down, up, *frozen = _cut(saved, lengths)
        wants_x = ctx.needs_input_grad[1]
        grad_x, grad_down, grad_up = ops.linears_backward(
            list(grads), x, _as(down, ctx.dtype), _as(up, ctx.dtype), scalings, *frozen, out_features, ctx.in_features,
            name, block_size, wants_x,
        )  # fmt: skip
        # None rather than zeros for an adapter whose output was not used: that is how dead adapters are detected
        used = [grad is not None for grad in grads]
        adapters = [
            gradient.to(own.dtype) if exists else None
            for gradients, parameters in ((grad_down, down), (grad_up, up))
            for gradient, own, exists in zip(gradients, parameters, used, strict=bool(parameters))
        ]
        return None, grad_x if wants_x else None, *adapters, *[None] * sum(lengths[2:])


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


def _cut(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Split ``tensors`` into lists of these lengths."""
    lists, place = [], 0
    for length in lengths:
        lists.append(list(tensors[place : place + length]))
        place += length
    return lists


def _dense(
    packed: Tensor, absmax: Tensor, nested: list[Tensor], offset: list[Tensor], out_features: int, in_features: int,
    name: str, block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _matrices(in_features, [out_features], [packed], [absmax], nested, offset, name, block_size)[0].whole(dtype)


def densify(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    """Return ``matrix`` dequantized to ``dtype``, so that backward need not dequantize it again."""
    quantized = matrix.quantized
    assert quantized is not None
    nested = [] if quantized.nested is None else [quantized.nested]
    offset = [] if quantized.offset is None else [quantized.offset]
    out, into, quant_format = matrix.out_features, matrix.in_features, matrix.quant_format
    made = ops.dense(
        quantized.packed, quantized.absmax, nested, offset, out, into, quant_format.name, quant_format.block_size, dtype
    )
    return Matrix(out, into, None, quant_format, made)


def multiply(
    x: Tensor, matrices: Sequence[Matrix], down: Sequence[Tensor] = (), up: Sequence[Tensor] = (),
    scalings: Sequence[float] = (),
) -> list[Tensor]:  # fmt: skip
    """Return ``x`` times each of ``matrices``, each with its adapter if adapters are given.

    Args:
        x: ``[..., in_features]``.
        matrices: frozen matrices with the same ``in_features`` and format.
        down: the A of each adapter, ``[r, in_features]``; cast to ``x``'s dtype.
        up: the B of each adapter, ``[out_features, r]``; cast to ``x``'s dtype.
        scalings: the factor of each adapter's product.

    Returns:
        ``[..., out_features]`` for each matrix.
    """
    out_features = [m.out_features for m in matrices]
    if matrices[0].quantized is None:
        frozen: list[list[Tensor]] = [[m.dense for m in matrices if m.dense is not None], [], [], []]
        name, block_size = DENSE, 0
    else:
        quantized = [m.quantized for m in matrices if m.quantized is not None]
        nested = [q.nested for q in quantized if q.nested is not None]
        offset = [q.offset for q in quantized if q.offset is not None]
        frozen = [[q.packed for q in quantized], [q.absmax for q in quantized], nested, offset]
        quant_format = matrices[0].quant_format
        name, block_size = quant_format.key, quant_format.block_size
    parts = [list(down), list(up), *frozen]
    spec = (list(scalings), [len(part) for part in parts], out_features, name, block_size)
    return list(_Linears.apply(spec, x, *(t for part in parts for t in part)))  # type: ignore[arg-type]


def _fake_linears(
    x: Tensor, down: Any, up: Any, scalings: Any, packed: Any, absmax: Any, nested: Any, offset: Any,
    out_features: list[int], name: str, block_size: int,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(*x.shape[:-1], out) for out in out_features]


def _fake_linears_backward(
    grads: list[Tensor | None], x: Any, down: list[Tensor], up: list[Tensor], scalings: Any, packed: Any, absmax: Any,
    nested: Any, offset: Any, out_features: Any, in_features: int, name: str, block_size: int, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    used = next(g for g in grads if g is not None)
    grad_x = used.new_empty((*used.shape[:-1], in_features) if wants_x else 0)
    return grad_x, [a.new_empty(a.shape) for a in down], [b.new_empty(b.shape) for b in up]


def _fake_dense(
    packed: Tensor, absmax: Any, nested: Any, offset: Any, out_features: int, in_features: int, name: str,
    block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty(out_features, in_features, dtype=dtype)


ops = torch.ops.fsdp_qlora
BODIES: dict[Any, Callable[..., Any]] = register(
    {"linears": (_linears, _fake_linears), "linears_backward": (_linears_backward, _fake_linears_backward),
     "dense": (_dense, _fake_dense)}
)  # fmt: skip
"""The functions behind the ops, by op; simulated steps call them directly."""
