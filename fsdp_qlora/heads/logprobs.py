"""Cross entropy over supervised tokens, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fsdp_qlora.quant.gemm import add_product, matmul, product_into

CACHED_BYTES = 3 * 2**20
"""Float32 logits that a CPU processes at a time, so that repeated passes over them stay in its caches."""

CrossEntropy = Callable[[torch.Tensor, torch.Tensor, float, float | None, bool], torch.Tensor]
"""`cross_entropy_`, or a kernel that computes the same."""
BlockCrossEntropy = CrossEntropy
"""`block_cross_entropy_`, or the same, compiled."""


def rows_at_a_time(vocab_size: int, device: torch.device) -> int:
    """Return how many rows of logits are converted to float32 at a time: on an accelerator, all of a chunk."""
    return max(1, CACHED_BYTES // (4 * vocab_size)) if device.type == "cpu" else 2**31


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None, wants_grad: bool
) -> torch.Tensor:
    """Return the cross entropy of each row, float32 ``[rows]``; with ``wants_grad`` its gradient replaces the logits.

    Args:
        logits: ``[rows, vocab]``, the head's product; everything else is computed in float32.
        targets: int64 ``[rows]``.
        scale: factor on the logits.
        softcap: see `LossHead`.
        wants_grad: whether to overwrite ``logits`` with (softmax - one-hot) times the derivative of scale and cap.
    """
    return in_blocks(block_cross_entropy_, logits, targets, scale, softcap, wants_grad)


def in_blocks(
    block: BlockCrossEntropy, logits: torch.Tensor, targets: torch.Tensor, scale: float, softcap: float | None,
    wants_grad: bool,
) -> torch.Tensor:  # fmt: skip
    """Return what `cross_entropy_` returns, computed by ``block`` for `rows_at_a_time`."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    size = rows_at_a_time(logits.shape[1], logits.device)
    for raw, target, loss in zip(logits.split(size), targets[:, None].split(size), losses.split(size), strict=True):
        loss.copy_(block(raw, target, scale, softcap, wants_grad))
    return losses


def block_cross_entropy_(
    raw: torch.Tensor, target: torch.Tensor, scale: float, softcap: float | None, wants_grad: bool
) -> torch.Tensor:
    """Return the cross entropy of a block of rows, as `cross_entropy_` does; ``target`` is int64 ``[rows, 1]``."""
    values = raw.float() if raw.dtype != torch.float32 else raw.clone()
    if scale != 1.0:
        values *= scale
    capped = None
    if softcap is not None:
        capped = torch.tanh_(values.div_(softcap))  # in (-1, 1)
        values = capped * softcap
    top = values.amax(dim=-1, keepdim=True)
    chosen = values.gather(1, target) - top
    values.sub_(top).exp_()
    total = values.sum(dim=-1, keepdim=True)
    losses = (total.log() - chosen).squeeze(1)
    if wants_grad:
        values.div_(total).scatter_add_(1, target, torch.full_like(top, -1.0))
        if capped is not None:
            values.mul_(capped.square_().neg_().add_(1))  # d tanh(x) = 1 - tanh(x)^2
        if scale != 1.0:
            values *= scale
        raw.copy_(values)
    return losses


def cross_entropy_by_code(
    logits: torch.Tensor, targets: torch.Tensor, code: Callable[[torch.Tensor], torch.Tensor], wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of ``code(logits)``, float32 ``[rows]``, and its gradient.

    Args:
        logits: ``[rows, vocab]``, the head's product.
        targets: int64 ``[rows]``.
        code: upstream's code after the head; it may change the number of columns, but not of rows.
        wants_grad: whether to compute the gradient with respect to ``logits``; otherwise ``logits`` are returned in its
            place.
    """
    with torch.set_grad_enabled(wants_grad):
        raw = logits.detach().requires_grad_(wants_grad)
        losses = torch.nn.functional.cross_entropy(code(raw).float(), targets, reduction="none")
        grad = torch.autograd.grad(losses.sum(), raw)[0] if wants_grad else logits
    return losses.detach(), grad


class ChunkedCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy of ``hidden @ weight.T`` (frozen weight) against labels.

    ``rows``, if any, are trained float32 rows that follow those of ``weight``. Their gradient needs the weight of each
    token's loss, which only backward knows; until then the derivatives by their few logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
        code: Callable[[torch.Tensor], torch.Tensor] | None,
        cross_entropy: CrossEntropy,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the losses, float32 ``[tokens]``; also computes the gradient of ``hidden``, which backward scales."""
        wants_grad = ctx.needs_input_grad[0]
        added = hidden.new_empty(0, hidden.shape[1]) if rows is None else rows.to(hidden.dtype)
        slopes = hidden.new_empty(len(hidden), len(added))
        ctx.chunk = chunk
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if wants_grad else None
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, added)
            if bias is not None:
                logits += bias
            if code is None:
                losses[part] = cross_entropy(logits, labels[part], scale, softcap, wants_grad)
            else:
                losses[part], logits = cross_entropy_by_code(logits, labels[part], code, wants_grad)
            if grad is not None:
                own, slopes[part] = logits.tensor_split([len(weight)], dim=1)
                product_into(grad[part], own, weight)
                if rows is not None:
                    add_product(grad[part], slopes[part], added)
        if grad is not None:
            ctx.save_for_backward(grad, *(() if rows is None else (slopes, hidden)))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``hidden`` and of ``rows``; the head is frozen."""
        grad_hidden, *kept = ctx.saved_tensors
        of_rows = row_gradient(kept[0], grads[0], kept[1], ctx.chunk) if kept else None
        return (grad_hidden * grads[0].unsqueeze(1).to(grad_hidden.dtype), *[None] * 8, of_rows)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Return ``hidden`` times the rows of both matrices, written side by side: neither matrix is copied."""
    if not len(added):
        return matmul(hidden, weight.t())
    logits = hidden.new_empty(len(hidden), len(weight) + len(added))
    own, new = logits.tensor_split([len(weight)], dim=1)
    product_into(own, hidden, weight.t())
    product_into(new, hidden, added.t())
    return logits


def row_gradient(slopes: torch.Tensor, weights: torch.Tensor, hidden: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the gradient of trained rows, float32 ``[count, hidden]``.

    Args:
        slopes: ``[tokens, count]``, the derivative of each token's loss by its logits of these rows.
        weights: ``[tokens]``, the derivative of the result by each token's loss.
        hidden: ``[tokens, hidden]``, the input of the head.
        chunk: number of tokens that are float32 at a time.
    """
    grad = torch.zeros(slopes.shape[1], hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for slope, weight, x in zip(slopes.split(chunk), weights.split(chunk), hidden.split(chunk), strict=True):
        grad.addmm_((slope.float() * weight[:, None]).t(), x.float())
    return grad
