"""The loss of a head that is trained: a chunk of logits at a time, computed again in backward.

A frozen head computes the gradient of its input in forward (`logprobs.py`). The gradient of its own weight, or of a
low-rank addition to it, needs the weight of each token's loss, which only backward knows, and all logits at once would
be the largest tensor of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fsdp_qlora.heads.logprobs import CrossEntropy, cross_entropy_by_code
from fsdp_qlora.quant.gemm import add_product, matmul, product_into

Code = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LogitSettings:
    """How logits become losses; see `LossHead`."""

    chunk: int
    scale: float
    softcap: float | None
    code: Code | None
    cross_entropy: CrossEntropy


class TrainedCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy of ``hidden @ weight.T + low @ up.T + bias`` against labels, with gradients for all.

    Shapes: hidden ``[tokens, hidden]``, weight ``[vocab, hidden]``, bias ``[vocab]`` or None, and low ``[tokens, r]``
    with up ``[vocab, r]``, or None for both: LoRA's products, its scaling in ``low``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, low: torch.Tensor | None,
        up: torch.Tensor | None, labels: torch.Tensor, settings: LogitSettings,
    ) -> torch.Tensor:  # fmt: skip
        """Return the losses, float32 ``[tokens]``."""
        ctx.save_for_backward(hidden, weight, bias, low, up, labels)
        ctx.settings = settings
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for part, of_chunk, _ in _chunks(hidden, weight, bias, low, up, labels, settings, wants_grad=False):
            losses[part] = of_chunk
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients; those of ``weight``, ``bias`` and ``up`` add up in float32."""
        hidden, weight, bias, low, up, labels = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight, of_bias, of_low, of_up = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=hidden.device)
            if needed and tensor is not None
            else None
            for tensor, needed in zip((weight, bias, low, up), ctx.needs_input_grad[1:5], strict=True)
        )
        for part, _, slopes in _chunks(hidden, weight, bias, low, up, labels, ctx.settings, wants_grad=True):
            slope = slopes.mul_(grads[0][part, None].to(slopes.dtype))
            if of_hidden is not None:
                product_into(of_hidden[part], slope, weight)
            if of_weight is not None:
                of_weight += matmul(slope.t(), hidden[part])
            if of_bias is not None:
                of_bias += slope.sum(0, dtype=torch.float32)
            if of_low is not None:
                of_low[part] = matmul(slope, up)
            if of_up is not None:
                of_up += matmul(slope.t(), low[part])
        made = zip((of_weight, of_bias, of_low, of_up), (weight, bias, low, up), strict=True)
        return of_hidden, *(None if grad is None else grad.to(tensor.dtype) for grad, tensor in made), None, None


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, low: torch.Tensor | None,
    up: torch.Tensor | None, labels: torch.Tensor, settings: LogitSettings, wants_grad: bool,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Yield for each chunk of tokens its place, its losses and, if wanted, their derivatives by the logits."""
    for start in range(0, labels.numel(), settings.chunk):
        part = slice(start, start + settings.chunk)
        logits = matmul(hidden[part], weight.t())
        if low is not None and up is not None:
            add_product(logits, low[part], up.t())
        if bias is not None:
            logits += bias
        if settings.code is None:
            scale, softcap = settings.scale, settings.softcap
            yield part, settings.cross_entropy(logits, labels[part], scale, softcap, wants_grad), logits
        else:
            yield part, *cross_entropy_by_code(logits, labels[part], settings.code, wants_grad)
