"""Quantized embedding and head: only looked-up rows are dequantized, and the head a slice of the vocabulary at a time.

The dense head never exists whole. The cross entropy passes over the slices twice: once for each token's log-sum-exp (a
running maximum and sum, as in online softmax, https://arxiv.org/abs/1805.02867), and once for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.errors import PlanError
from fsdp_qlora.heads.added import WithTokenRows
from fsdp_qlora.heads.logprobs import row_gradient
from fsdp_qlora.heads.upstream import AfterHead
from fsdp_qlora.quant.embedding import QuantEmbedding
from fsdp_qlora.quant.formats import Format
from fsdp_qlora.quant.matrices import QuantMatrices, frozen
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes


class QuantLossHead(WithTokenRows):
    """An output head on a quantized matrix, its own or the embedding's, with the interface of `LossHead`.

    Attributes:
        logit_scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None for no cap.
        chunk: number of tokens whose logits exist at the same time.
    """

    def __init__(self, own: QuantMatrices | None, tied: QuantEmbedding | None, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrices = own
        self._tied = (tied,)  # in a tuple, so that the embedding is not registered as a child
        self.bias = bias
        self.logit_scale, self.chunk = 1.0, 256
        self.softcap: float | None = None

    @property
    def source(self) -> QuantMatrices:
        """The matrix ``[vocab, hidden]``."""
        matrices = self.matrices if self.matrices is not None else self._tied[0]
        assert matrices is not None
        return matrices

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of the slices of the vocabulary; trained rows are the last one."""
        first = self.source.out_features if self.rows is None else self.rows.first
        for start, stop in self.source.matrix().slices():
            if start < first:
                yield start, min(stop, first)
        if self.rows is not None:
            yield first, self.rows.last

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the dense weight ``[stop - start, hidden]`` and the bias of a slice."""
        if self.trained is not None and self.rows is not None and start == self.rows.first:
            return self.trained.to(dtype), None
        bias = None if self.bias is None else self.bias[start:stop]
        return self.source.matrix().rows(start, stop, dtype), bias

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits ``[..., vocab]``; with ``labels`` int64 ``[tokens]``, the float32 losses ``[tokens]``."""
        if labels is None:
            flat = input.flatten(0, -2)  # as in `LossHead`
            logits = torch.cat([F.linear(flat, *self.dense(a, b, flat.dtype)) for a, b in self.slices()], dim=-1)
            return logits.unflatten(0, input.shape[:-1])
        return _SlicedCrossEntropy.apply(input, labels, self, self.trained)  # type: ignore[return-value]

    def logits(self, hidden: torch.Tensor, dense: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """Return the float32 logits of a slice, after scale and cap."""
        raw = F.linear(hidden, *dense).float() * self.logit_scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


class _SlicedCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy; forward also computes the gradient of the hidden states, since the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: QuantLossHead, rows: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.chunk = head.chunk
        chunks = [slice(i, i + head.chunk) for i in range(0, labels.numel(), head.chunk)]
        largest = torch.full(labels.shape, -torch.inf, dtype=torch.float32, device=hidden.device)
        total, target = torch.zeros_like(largest), torch.zeros_like(largest)
        for start, stop in head.slices():
            dense = head.dense(start, stop, hidden.dtype)
            for part in chunks:
                logits = head.logits(hidden[part], dense)
                # online softmax: rescale the running sum to the new maximum before adding this slice
                top = torch.maximum(largest[part], logits.amax(dim=-1))
                total[part] = total[part] * torch.exp(largest[part] - top) + torch.exp(logits - top[:, None]).sum(-1)
                largest[part] = top
                inside = (labels[part] >= start) & (labels[part] < stop)
                place = torch.where(inside, labels[part] - start, 0)
                target[part] += torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), 0.0)
        log_sum = largest + torch.log(total)
        if ctx.needs_input_grad[0]:
            grad, slopes = _gradient(hidden, labels, head, log_sum, chunks)
            ctx.save_for_backward(grad, *(() if rows is None else (slopes, hidden)))
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *kept = ctx.saved_tensors
        of_rows = row_gradient(kept[0], grads[0], kept[1], ctx.chunk) if kept else None
        return grad_hidden * grads[0].unsqueeze(1).to(grad_hidden.dtype), None, None, of_rows


def _gradient(
    hidden: torch.Tensor, labels: torch.Tensor, head: QuantLossHead, log_sum: torch.Tensor, chunks: list[slice]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return d loss / d hidden, ``[tokens, hidden]``, and d loss / d logits of the trained rows, ``[tokens, count]``.

    The former is (softmax - one-hot) @ weight, summed over the slices.
    """
    grad = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    of_rows = None if head.trained is None else hidden.new_empty(len(hidden), len(head.trained))
    for start, stop in head.slices():
        dense = head.dense(start, stop, hidden.dtype)
        for part in chunks:
            logits = head.logits(hidden[part], dense)
            slope = torch.exp(logits - log_sum[part, None])
            inside = (labels[part] >= start) & (labels[part] < stop)
            place = torch.where(inside, labels[part] - start, 0)
            slope.scatter_add_(1, place[:, None], -inside.float()[:, None])
            if head.softcap is not None:
                slope *= 1 - (logits / head.softcap) ** 2
            slope = (slope * head.logit_scale).to(hidden.dtype)
            grad[part] += slope @ dense[0]
            if of_rows is not None and head.rows is not None and start == head.rows.first:
                of_rows[part] = slope
    return grad.to(hidden.dtype), of_rows


def quantize_edges(model: PreTrainedModel, shapes: ModelShapes, quant_format: Format) -> None:
    """Replace embedding and head of a meta model by quantized ones; if tied, they share one packed table.

    Raises:
        PlanError: if the embedding does more than look up and scale rows.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding) and isinstance(head, nn.Linear)
    scale = getattr(table, "scalar_embed_scale", None)
    if type(table) is not nn.Embedding and scale is None:
        raise PlanError(
            f"quant.embeddings: a {type(table).__name__} does more than look up rows, so it cannot be replaced. Set "
            "quant.embeddings=none."
        )
    vocab, hidden = shapes.vocab_size, shapes.hidden_size
    embedding = QuantEmbedding(vocab, hidden, quant_format, table.weight.dtype, 1.0 if scale is None else scale)
    embedding.stored = LinearShape(shapes.embedding, vocab, hidden)
    own = None
    if not shapes.tied:
        own = QuantMatrices(hidden, vocab, quant_format)
        own.stored = LinearShape(shapes.head, vocab, hidden)
    model.set_input_embeddings(embedding)
    bias = None if head.bias is None else frozen(head.bias.detach())
    model.set_output_embeddings(QuantLossHead(own, embedding if shapes.tied else None, bias))


def configure_loss_head(head: QuantLossHead, after: AfterHead, chunk: int) -> None:
    """Set the head's logit scale, soft cap and chunk size.

    Raises:
        PlanError: if upstream does more with the logits, which needs all logits of a token at once.
    """
    if after.code is not None:
        raise PlanError(
            "quant.embeddings: this model does more with its logits than scale and cap them, which needs all of them "
            "at once, but a quantized head computes them a slice at a time. Set quant.embeddings=none."
        )
    head.logit_scale, head.softcap = after.scale, after.softcap
    head.chunk = chunk
