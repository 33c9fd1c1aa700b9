"""The loss of a head that is trained: a chunk of logits at a time, computed again in backward.

A frozen head computes the gradient of its input in forward (`logprobs.py`). The gradient of its own weight needs the
weight of each token's loss, which only backward knows, and all logits at once would be the largest tensor of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fsdp_qlora.heads.logprobs import CrossEntropy, cross_entropy_by_code
from fsdp_qlora.quant.gemm import matmul, product_into

Code = Callable[[torch.Tensor], torch.Tensor]


class TrainedCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy of ``hidden @ weight.T + bias`` against labels, with gradients for all three."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        chunk: int, scale: float, softcap: float | None, code: Code | None, cross_entropy: CrossEntropy,
    ) -> torch.Tensor:  # fmt: skip
        """Return the losses, float32 ``[tokens]``."""
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.settings = chunk, scale, softcap, code, cross_entropy
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for part, of_chunk, _ in _chunks(hidden, weight, bias, labels, *ctx.settings, wants_grad=False):
            losses[part] = of_chunk
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``hidden``, ``weight`` and ``bias``; the latter two add up in float32."""
        hidden, weight, bias, labels = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        of_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for part, _, slopes in _chunks(hidden, weight, bias, labels, *ctx.settings, wants_grad=True):
            slope = slopes.mul_(grads[0][part, None].to(slopes.dtype))
            product_into(of_hidden[part], slope, weight)
            of_weight += matmul(slope.t(), hidden[part])
            if of_bias is not None:
                of_bias += slope.sum(0, dtype=torch.float32)
        of_bias = None if of_bias is None else of_bias.to(weight.dtype)
        return of_hidden, of_weight.to(weight.dtype), of_bias, *[None] * 6


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, chunk: int,
    scale: float, softcap: float | None, code: Code | None, cross_entropy: CrossEntropy, wants_grad: bool,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Yield for each chunk of tokens its place, its losses and, if wanted, their derivatives by the logits."""
    for start in range(0, labels.numel(), chunk):
        part = slice(start, start + chunk)
        logits = matmul(hidden[part], weight.t())
        if bias is not None:
            logits += bias
        if code is None:
            yield part, cross_entropy(logits, labels[part], scale, softcap, wants_grad), logits
        else:
            yield part, *cross_entropy_by_code(logits, labels[part], code, wants_grad)
