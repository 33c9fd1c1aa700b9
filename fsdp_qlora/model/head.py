"""The output head and its loss: cross entropy over supervised tokens, a chunk of logits at a time.

All logits of a batch are never held. For a frozen head the gradient of the hidden states is computed chunk by chunk in
forward (the idea of Liger-Kernel's fused linear cross entropy, https://arxiv.org/abs/2410.10989), in float32 per chunk;
what is kept is one ``[tokens, hidden]`` tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def logit_settings(model_config: Any) -> tuple[float, float | None]:
    """Return the factor on the logits (Cohere, Granite) and their soft cap (Gemma 2), as the model's config says."""
    scale = getattr(model_config, "logit_scale", None) or 1.0
    scale /= getattr(model_config, "logits_scaling", None) or 1.0
    return scale, getattr(model_config, "final_logit_softcapping", None)


class LossHead(nn.Linear):
    """An ``nn.Linear`` head that, given labels, returns each token's loss instead of logits.

    Attributes:
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2); None = not.
        chunk: tokens whose logits exist at the same time.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    chunk: int = 256

    @staticmethod
    def from_linear(linear: nn.Linear, model_config: Any, chunk: int) -> LossHead:
        """Wrap a head, sharing its weight and bias (a tie with the embedding stays)."""
        head = LossHead(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias, head.chunk = linear.weight, linear.bias, chunk
        head.logit_scale, head.softcap = logit_settings(model_config)
        return head

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits ``[..., vocab]``; with ``labels`` int64 ``[tokens]``, the float32 losses ``[tokens]``.

        ``input`` is ``[..., hidden]``, with labels ``[tokens, hidden]``.
        """
        if labels is None:
            return super().forward(input)
        losses: torch.Tensor = _ChunkedCrossEntropy.apply(
            input, self.weight, self.bias, labels, self.chunk, self.logit_scale, self.softcap
        )  # type: ignore[assignment]
        return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy of ``hidden @ weight.T`` (frozen weight) against labels."""

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
    ) -> torch.Tensor:
        wants_grad = ctx.needs_input_grad[0]
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if wants_grad else None
        for start in range(0, labels.numel(), chunk):
            part = slice(start, start + chunk)
            raw = torch.nn.functional.linear(hidden[part], weight, bias).float() * scale
            logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
            target = labels[part, None]
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[part] = (log_sum - logits.gather(1, target)).squeeze(1)
            if grad is not None:
                slope = torch.exp(logits - log_sum)
                slope.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                if softcap is not None:
                    slope *= 1 - (logits / softcap) ** 2
                grad[part] = (slope * scale).to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grads[0].unsqueeze(1).to(grad_hidden.dtype), None, None, None, None, None, None)
