"""``attn_implementation=varlen``: causal attention within each of several sequences concatenated in one row.

It is equivalent to flash attention's varlen function and reads the boundaries of the sequences and the length of the
longest one from the same arguments. On a GPU it uses torch's own kernel (`torch.nn.attention.varlen`). On a CPU it is
an op in plain torch with its own forward and backward, one block of queries at a time. So the whole path of packed rows
with flash attention can run, and is tested, without a GPU.

Without boundaries (evaluation, generation) each row of the batch is one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from fsdp_qlora.attention.blocks import QUERY_BLOCK
from fsdp_qlora.attention.blockwise import refuse_unknown
from fsdp_qlora.errors import ModelError
from fsdp_qlora.quant.gemm import matmul
from fsdp_qlora.quant.ops import register

VARLEN = "varlen"
"""Name in transformers' attention interface."""


def varlen_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention, with the interface of transformers' attention functions.

    Args:
        module: the attention module.
        query: ``[rows, heads, queries, size]``.
        key: ``[rows, key heads, keys, size]``.
        value: ``[rows, key heads, keys, value size]``.
        attention_mask: bool ``[rows, 1, queries, keys]`` if some tokens are padding, else None.
        dropout: must be 0.
        scaling: factor on the scores.
        sliding_window: number of tokens that a token sees, itself included; None for all before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        cu_seq_lens_q: int32 ``[sequences + 1]``, boundaries of the sequences in a single row.
        max_length_q: length of the longest sequence, or an upper bound.
        is_causal: whether later tokens are hidden; None for the module's ``is_causal``. Must be true.
        kwargs: other arguments of some models; sinks and biases are refused.

    Returns:
        The output ``[rows, queries, heads, value size]``, and None for the scores.
    """
    refuse_unknown(VARLEN, kwargs)
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelError(
            "model.attn_implementation: varlen is causal, but this model attends to later tokens; use eager."
        )
    if dropout:
        raise ModelError("model.attn_implementation: varlen does not support attention dropout; use eager.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return _with_cache(query, key, value, attention_mask, scale, sliding_window, softcap), None
    rows, _, length, _ = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = _a_sequence_each(rows, length, query.device), length
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if query.device.type == "cpu":
        out: Tensor = _Attention.apply(q, k, v, cu_seq_lens_q, scale, sliding_window or 0, softcap or 0.0)  # type: ignore[assignment]
    else:
        out = _on_accelerator(q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window, softcap)
    return out.unflatten(0, (rows, length)), None


def _a_sequence_each(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


def _on_accelerator(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Return torch's own varlen attention for ``[tokens, heads, size]``."""
    from torch.nn.attention.varlen import varlen_attn  # imported here because it loads GPU kernels

    if softcap is not None:
        raise ModelError(
            "model.attn_implementation: varlen does not support soft caps on a GPU, which this model needs; use eager."
        )
    seen = (-1, 0) if window is None else (window - 1, 0)
    out = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=seen,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _with_cache(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Return attention over cached keys or with a mask, for generation: the last query sees the last key."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        places = torch.arange(keys, device=query.device)
        own = places[keys - queries :, None]
        mask = places <= own
        if window is not None:
            mask = mask & (places > own - window)
    group = query.shape[1] // key.shape[1]
    scores = (query @ repeat_kv(key, group).transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    out = torch.softmax(scores, dim=-1).to(value.dtype) @ repeat_kv(value, group)
    return out.transpose(1, 2).contiguous()


def _mask(q_length: int, kv_length: int, attention_mask: Tensor | None = None, **settings: Any) -> Tensor | None:
    """Return a mask only if there is padding; boundaries separate the sequences."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    settings |= {"allow_is_causal_skip": False}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **settings)


def _blocks(ends: list[int], window: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, stop, first)``: each block of queries, and the first key that any of them sees."""
    for begin, end in pairwise(ends):
        for start in range(begin, end, QUERY_BLOCK):
            first = begin if window == 0 else max(begin, start - window + 1)
            yield start, min(start + QUERY_BLOCK, end), first


class _Heads:
    """Queries, keys and values by key head, for products of a block of queries with its keys."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> None:
        self.tokens, heads, self.size = query.shape
        self.key_heads, self.window, self.softcap = key.shape[1], window, softcap
        self.group = heads // self.key_heads
        self.query, self.key, self.value = self.by_head(query) * scale, key.transpose(0, 1), value.transpose(0, 1)

    def by_head(self, of: Tensor) -> Tensor:
        """Return ``[tokens, heads, size]`` as ``[key heads, group, tokens, size]``."""
        return of.unflatten(1, (self.key_heads, self.group)).permute(1, 2, 0, 3)

    def block(self, of: Tensor, start: int, stop: int) -> Tensor:
        """Cut a block of `by_head`'s result as ``[key heads, group x block, size]``."""
        return of[:, :, start:stop].flatten(1, 2)

    def probabilities(self, start: int, stop: int, first: int) -> tuple[Tensor, Tensor | None]:
        """Return the softmax of a block's scores, ``[key heads, group x block, keys]``, and the cap's derivative."""
        scores = matmul(self.block(self.query, start, stop), self.key[:, first:stop].transpose(1, 2))
        slope = None
        if self.softcap:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = capped * self.softcap, 1 - capped.square()
        own = torch.arange(start, stop)[:, None] - torch.arange(first, stop)  # distance from key to query
        hidden = own < 0 if self.window == 0 else (own < 0) | (own >= self.window)
        scores = scores.masked_fill_(hidden.repeat(self.group, 1), -torch.inf)
        return torch.softmax(scores, dim=-1), slope


def _attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    return forward(query, key, value, boundaries.tolist(), scale, window, softcap)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, boundaries: Tensor, scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, query, key, value, out, boundaries.tolist(), scale, window, softcap)


def forward(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], scale: float, window: int, softcap: float
) -> Tensor:
    """Compute attention within each sequence; ``ends`` are the boundaries as Python integers."""
    heads = _Heads(query, key, value, scale, window, softcap)
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    laid = heads.by_head(out)
    for start, stop, first in _blocks(ends, window):
        product = matmul(heads.probabilities(start, stop, first)[0], heads.value[:, first:stop])
        laid[:, :, start:stop] = product.unflatten(1, (heads.group, stop - start))
    return out


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, ends: list[int], scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value (flash attention's formulas, https://arxiv.org/abs/2205.14135)."""
    heads = _Heads(query, key, value, scale, window, softcap)
    grads = heads.by_head(grad)
    # sum over keys of probability * its gradient = dot(output, gradient of the output)
    dots = heads.by_head((grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype))
    grad_query = torch.empty_like(heads.query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(heads.key.shape, dtype=torch.float32, device=grad.device)
    grad_value = torch.zeros(heads.value.shape, dtype=torch.float32, device=grad.device)
    for start, stop, first in _blocks(ends, window):
        part = heads.block(grads, start, stop)
        scores, cap = heads.probabilities(start, stop, first)
        grad_value[:, first:stop] += matmul(scores.transpose(1, 2), part)
        slope = matmul(part, heads.value[:, first:stop].transpose(1, 2))
        slope = (slope - heads.block(dots, start, stop)) * scores
        if cap is not None:
            slope = slope * cap
        own = matmul(slope, heads.key[:, first:stop])
        grad_query[:, :, start:stop] = own.unflatten(1, (heads.group, stop - start))
        grad_key[:, first:stop] += matmul(slope.transpose(1, 2), heads.block(heads.query, start, stop))
    return (
        (grad_query * scale).permute(2, 0, 1, 3).flatten(1, 2).contiguous(),
        grad_key.to(key.dtype).transpose(0, 1).contiguous(),
        grad_value.to(value.dtype).transpose(0, 1).contiguous(),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float, window: int,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        out = ops.varlen_attention(query, key, value, boundaries, scale, window, softcap)
        ctx.save_for_backward(query, key, value, out, boundaries)
        ctx.scale, ctx.window, ctx.softcap = scale, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, boundaries = ctx.saved_tensors
        gradients = ops.varlen_attention_backward(
            grads[0], query, key, value, out, boundaries, ctx.scale, ctx.window, ctx.softcap
        )
        return (*gradients, None, None, None, None)


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])


def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, boundaries: Tensor, scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


ops = torch.ops.fsdp_qlora
BODIES = register(
    {
        "varlen_attention": (_attention, _fake_attention),
        "varlen_attention_backward": (_attention_backward, _fake_attention_backward),
    }
)
"""The functions behind the ops, by op."""
AttentionInterface.register(VARLEN, varlen_forward)
AttentionMaskInterface.register(VARLEN, _mask)
