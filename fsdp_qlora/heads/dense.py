"""The output head and its loss: cross entropy over supervised tokens, a chunk of logits at a time.

All logits of a batch are never held. For a frozen head the gradient of the hidden states is computed chunk by chunk in
forward (the idea of Liger-Kernel's fused linear cross entropy, https://arxiv.org/abs/2410.10989), in float32 per chunk;
what is kept is one ``[tokens, hidden]`` tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fsdp_qlora.heads.around import AfterHead
from fsdp_qlora.heads.logprobs import _ChunkedCrossEntropy


class LossHead(nn.Linear):
    """An ``nn.Linear`` head that, given labels, returns each token's loss instead of logits.

    Attributes:
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2); None = not.
        code: upstream's code after the head, ``[tokens, vocab]`` -> ``[tokens, columns]``; scale and cap are then 1 and
            None. See `fsdp_qlora.heads.around`.
        chunk: tokens whose logits exist at the same time.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    code: Callable[[torch.Tensor], torch.Tensor] | None = None
    chunk: int = 256

    @staticmethod
    def from_linear(linear: nn.Linear, after: AfterHead, chunk: int) -> LossHead:
        """Wrap a head, sharing its weight and bias (a tie with the embedding stays)."""
        head = LossHead(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias, head.chunk = linear.weight, linear.bias, chunk
        head.logit_scale, head.softcap, head.code = after.scale, after.softcap, after.code
        return head

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits ``[..., vocab]``; with ``labels`` int64 ``[tokens]``, the float32 losses ``[tokens]``.

        ``input`` is ``[..., hidden]``, with labels ``[tokens, hidden]``.
        """
        if labels is None:
            return super().forward(input)
        losses: torch.Tensor = _ChunkedCrossEntropy.apply(
            input, self.weight, self.bias, labels, self.chunk, self.logit_scale, self.softcap, self.code
        )  # type: ignore[assignment]
        return losses
