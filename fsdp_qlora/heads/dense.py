"""The output head and its loss: cross entropy over supervised tokens, a chunk of logits at a time.

The logits of a batch never exist all at once. Because the head is frozen, forward computes the gradient of the hidden
states chunk by chunk (as in Liger-Kernel's fused linear cross entropy, https://arxiv.org/abs/2410.10989), with the
softmax in float32; it keeps a single ``[tokens, hidden]`` tensor for backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fsdp_qlora.heads.added import WithTokenRows
from fsdp_qlora.heads.logprobs import ChunkedCrossEntropy, CrossEntropy, cross_entropy_
from fsdp_qlora.heads.trained import TrainedCrossEntropy
from fsdp_qlora.heads.upstream import AfterHead


class LossHead(nn.Linear, WithTokenRows):
    """An ``nn.Linear`` head that, given labels, returns each token's loss instead of logits.

    Attributes:
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2); None for no cap.
        code: upstream's code after the head, ``[tokens, vocab]`` -> ``[tokens, columns]``; scale and cap are then 1 and
            None. See `fsdp_qlora.heads.upstream`.
        chunk: number of tokens whose logits exist at the same time.
        cross_entropy: computes the loss of a chunk; not used with ``code``.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    code: Callable[[torch.Tensor], torch.Tensor] | None = None
    chunk: int = 256
    cross_entropy: CrossEntropy = staticmethod(cross_entropy_)

    @staticmethod
    def from_linear(
        linear: nn.Linear, after: AfterHead, chunk: int, cross_entropy: CrossEntropy = cross_entropy_
    ) -> LossHead:
        """Wrap a head, sharing its weight and bias (so a tie with the embedding is kept)."""
        head = LossHead(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias, head.chunk = linear.weight, linear.bias, chunk
        head.logit_scale, head.softcap, head.code = after.scale, after.softcap, after.code
        head.cross_entropy = cross_entropy
        return head

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits ``[..., vocab]``; with ``labels`` int64 ``[tokens]``, the float32 losses ``[tokens]``.

        ``input`` is ``[..., hidden]``; with labels, ``[tokens, hidden]``.
        """
        weight, trained = self.weight, self.trained
        if self.rows is not None:
            weight = weight[: self.rows.first]  # a view: the base's own rows from there on are padding
        if labels is None:
            # generation takes the last token of each row: torch would copy a frozen weight for every row of such a view
            flat = input.flatten(0, -2)
            logits = nn.functional.linear(flat, weight, self.bias)
            if trained is not None:
                logits = torch.cat([logits, nn.functional.linear(flat, trained.to(flat.dtype))], dim=-1)
            return logits.unflatten(0, input.shape[:-1])
        if weight.requires_grad:
            return TrainedCrossEntropy.apply(  # type: ignore[return-value]
                input, weight, self.bias, labels, self.chunk, self.logit_scale, self.softcap, self.code,
                self.cross_entropy,
            )  # fmt: skip
        return ChunkedCrossEntropy.apply(  # type: ignore[return-value]
            input,
            weight,
            self.bias,
            labels,
            self.chunk,
            self.logit_scale,
            self.softcap,
            self.code,
            self.cross_entropy,
            trained,
        )
