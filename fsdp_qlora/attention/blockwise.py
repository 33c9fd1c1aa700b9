"""``attn_implementation=blockwise``: exact attention for CPUs, a block of queries at a time.

On a CPU the bf16 flash kernel behind sdpa is slower than eager attention. Eager attention in turn computes the half of
the scores that a causal mask discards, copies keys and values for every query head, and makes a float32 score matrix.
Here each block of queries is multiplied only with the keys it sees. Query heads that share a key head are rows of one
product. The softmax accumulates in float32 inside torch's own kernel, so results match eager attention. Backward
recomputes the scores of a block, unless sequences are short.

It is an op with a fake implementation, registered by name in transformers' public attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fsdp_qlora.attention.blocks import KEPT_SCORES_LENGTH, QUERY_BLOCK, pairs_seen
from fsdp_qlora.errors import ModelError
from fsdp_qlora.quant.gemm import matmul
from fsdp_qlora.quant.ops import register

BLOCKWISE = "blockwise"
"""Name in transformers' attention interface."""


_HARMLESS = frozenset(
    ["sliding_window", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
     "output_router_logits", "logits_to_keep", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
     "max_length_k"]
)  # fmt: skip
"""Arguments of attention functions that change nothing here: windows and boundaries are already in the mask."""


def refuse_unknown(attention: str, arguments: Mapping[str, Any]) -> None:
    """Reject arguments from a model that our attention function ``attention`` does not support.

    Raises:
        ModelError: if there is one; the message names it.
    """
    for name, asked in arguments.items():
        if asked is not None and asked is not False and name not in _HARMLESS:
            raise ModelError(
                f"model.attn_implementation: {attention} does not support {name}, which this model needs; use eager."
            )


def blockwise_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention, with the interface of transformers' attention functions.

    Args:
        module: the attention module; its ``is_causal`` applies if the argument is None.
        query: ``[rows, heads, queries, size]``.
        key: ``[rows, key heads, keys, size]``.
        value: ``[rows, key heads, keys, value size]``.
        attention_mask: bool ``[rows, 1, queries, keys]``, True where a query sees a key; None for no mask.
        dropout: must be 0.
        scaling: factor on the scores.
        is_causal: whether later keys are hidden, if there is no mask.
        kwargs: other arguments of some models; soft caps and sinks are refused.

    Returns:
        The output ``[rows, queries, heads, value size]``, and None for the scores.
    """
    refuse_unknown(BLOCKWISE, kwargs)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ModelError("model.attn_implementation: blockwise accepts boolean masks only; use eager.")
    if dropout:
        raise ModelError("model.attn_implementation: blockwise does not support attention dropout; use eager.")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    if length == 1 and not torch.is_grad_enabled():
        return _one_query(query, key, value, attention_mask, scale), None
    causal = bool(causal) and attention_mask is None and length > 1
    keep = causal and torch.is_grad_enabled() and length <= KEPT_SCORES_LENGTH
    out = _Attention.apply(query, key, value, attention_mask, scale, causal, keep)  # type: ignore[assignment]
    return out, None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the output ``[rows, 1, heads, value size]`` of a single query per head, which is decoding's case.

    Query heads that share a key head are rows of one product, so keys and values are read once, in the KV cache's own
    layout. On a CPU, torch's bf16 kernel behind sdpa takes 1.3 to 5 times as long for a batch of 16 rows, and 7 to 50
    times if it is given the shared heads as such (``enable_gqa``): it reads the keys again for every query head.
    """
    rows, heads, _, size = query.shape
    packed = (query * scale).reshape(rows, key.shape[1], heads // key.shape[1], size)
    scores = matmul(packed, key.transpose(2, 3))
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return matmul(torch.softmax(scores, dim=-1), value).reshape(rows, 1, heads, value.shape[-1])


def _blocks(length: int, keys: int, mask: Tensor | None, causal: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(start, stop, first, last)``: each block of queries, and the range of keys that any of them sees."""
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        if mask is None:
            yield start, stop, 0, stop if causal else keys
        else:
            places = mask[:, :, start:stop].flatten(0, 2).any(0).nonzero()
            first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, keys)
            yield start, stop, first, last


class _Heads:
    """Queries, keys and values laid out for one product per key head."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.rows, heads, self.length, self.size = query.shape
        self.key_heads, self.keys = key.shape[1], key.shape[2]
        self.group = heads // self.key_heads
        self.query = (query * scale).view(self.rows, self.key_heads, self.group, self.length, self.size)
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)

    def block(self, of: Tensor, start: int, stop: int) -> Tensor:
        """Cut a block of ``[rows, key heads, group, length, size]`` as ``[rows x key heads, group x block, size]``."""
        return of[:, :, :, start:stop].reshape(self.rows * self.key_heads, self.group * (stop - start), of.shape[-1])

    def unblock(self, block: Tensor, into: Tensor, start: int, stop: int) -> None:
        """Invert `block`: write ``block`` into ``into``."""
        into[:, :, :, start:stop] = block.view(self.rows, self.key_heads, self.group, stop - start, block.shape[-1])

    def probabilities(
        self, start: int, stop: int, first: int, last: int, mask: Tensor | None, causal: bool, out: Tensor | None = None
    ) -> Tensor:
        """Return the softmax of a block's scores, ``[rows x key heads, group x block, last - first]``."""
        scores = matmul(self.block(self.query, start, stop), self.key[:, first:last].transpose(1, 2))
        if causal:
            # only keys start to stop need a mask: the queries of the block see all earlier keys
            hidden = torch.ones(stop - start, stop - start, dtype=torch.bool, device=scores.device).triu_(1)
            own = scores.view(-1, stop - start, last - first)[..., start - first :]
            own.masked_fill_(hidden, -torch.inf)
        elif mask is not None:
            by_row = scores.view(self.rows, -1, stop - start, last - first)
            by_row.masked_fill_(~mask[:, :, start:stop, first:last], torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1) if out is None else torch.softmax(scores, -1, out=out.view_as(scores))


def _kept_scores(rows: int, heads: int, length: int, keep: bool) -> int:
    """Return how many probabilities are kept: for each block of queries, those of the keys up to its end."""
    return rows * heads * pairs_seen(length) if keep else 0


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return the output and, if kept, the probabilities of all blocks, one after the other."""
    heads = _Heads(query, key, value, scale)
    out = query.new_empty(heads.rows, heads.length, heads.key_heads, heads.group, value.shape[-1])
    laid = out.permute(0, 2, 3, 1, 4)
    rows, heads_of_queries, length, _ = query.shape
    kept, place = query.new_empty(_kept_scores(rows, heads_of_queries, length, keep)), 0
    for start, stop, first, last in _blocks(heads.length, heads.keys, mask, causal):
        size = rows * heads_of_queries * (stop - start) * (last - first) if keep else 0
        own = kept[place : place + size] if keep else None
        scores = heads.probabilities(start, stop, first, last, mask, causal, own)
        heads.unblock(matmul(scores, heads.value[:, first:last]), laid, start, stop)
        place += size
    return out.flatten(2, 3), kept


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mask: Tensor | None, kept: Tensor | None,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value (flash attention's formulas, https://arxiv.org/abs/2205.14135)."""
    heads = _Heads(query, key, value, scale)
    shape = (heads.rows, heads.length, heads.key_heads, heads.group, value.shape[-1])
    grads = grad.reshape(shape).permute(0, 2, 3, 1, 4)
    # sum over keys of probability * its gradient = dot(output, gradient of the output)
    dots = (grad.reshape(shape).float() * out.view(shape)).sum(-1, keepdim=True).to(grad.dtype).permute(0, 2, 3, 1, 4)
    grad_query = grad.new_empty(heads.query.shape)
    grad_key = torch.zeros(heads.key.shape, dtype=torch.float32, device=grad.device)
    grad_value = torch.zeros(heads.value.shape, dtype=torch.float32, device=grad.device)
    place = 0
    for start, stop, first, last in _blocks(heads.length, heads.keys, mask, causal):
        part = heads.block(grads, start, stop)
        if kept is not None:
            size = part.shape[0] * part.shape[1] * (last - first)
            scores = kept[place : place + size].view(*part.shape[:2], last - first)
            place += size
        else:
            scores = heads.probabilities(start, stop, first, last, mask, causal)
        grad_value[:, first:last] += matmul(scores.transpose(1, 2), part)
        slope = matmul(part, heads.value[:, first:last].transpose(1, 2))
        slope.sub_(heads.block(dots, start, stop)).mul_(scores)
        heads.unblock(matmul(slope, heads.key[:, first:last]), grad_query, start, stop)
        grad_key[:, first:last] += matmul(slope.transpose(1, 2), heads.block(heads.query, start, stop))
    return (
        grad_query.mul_(scale).view(query.shape),
        grad_key.to(key.dtype).view(key.shape),
        grad_value.to(value.dtype).view(value.shape),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool, keep: bool
    ) -> Tensor:
        out, kept = ops.attention(query, key, value, mask, scale, causal, keep)
        ctx.save_for_backward(query, key, value, out, mask, *([kept] if keep else []))
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, mask, *kept = ctx.saved_tensors
        known = kept[0] if kept else None
        gradients = ops.attention_backward(grads[0], query, key, value, out, mask, known, ctx.scale, ctx.causal)
        return (*gradients, None, None, None, None)


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    out = query.new_empty(rows, length, heads, value.shape[-1])
    return out, query.new_empty(_kept_scores(rows, heads, length, keep))


def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mask: Tensor | None, kept: Tensor | None,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


ops = torch.ops.fsdp_qlora
BODIES = register(
    {"attention": (_attention, _fake_attention), "attention_backward": (_attention_backward, _fake_attention_backward)}
)
"""The functions behind the ops, by op."""
AttentionInterface.register(BLOCKWISE, blockwise_forward)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)
