"""Replaces the parts of a step that depend on values, which fake tensors lack, through upstream's public hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fsdp_qlora.attention import blockwise, varlen
from fsdp_qlora.attention.blockwise import BLOCKWISE
from fsdp_qlora.attention.masks import masks_by
from fsdp_qlora.quant import grouped, products
from fsdp_qlora.quant.experts import EXPERTS_IMPLEMENTATION, experts_by_counts, num_experts

SDPA = "sdpa"
"""transformers' name of torch's attention."""


@contextmanager
def only_causal_masks() -> Iterator[None]:
    """Give attention no mask where causality is all that it would say, so that its kernel needs none.

    transformers omits such a mask if positions do not restart within a row; on fake tensors it cannot see that. Layers
    with a window shorter than the row still get one.
    """
    sdpa_mask = AttentionMaskInterface()[SDPA]

    def causal(*args: Any, **settings: Any) -> Any:
        return sdpa_mask(*args, **{**settings, "allow_is_causal_skip": True})

    with masks_by({BLOCKWISE: lambda *_, **__: None, SDPA: causal}):
        yield


@contextmanager
def evenly_spread_experts() -> Iterator[None]:
    """Route equally many tokens to every expert: there are no values to route by."""
    own = ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION]
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _evenly)
    try:
        yield
    finally:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, own)


def _every_key(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return blockwise attention without its mask: there are no values to tell which keys it hides."""

    def called(*arguments: Any) -> Any:
        return function(*(None if i == place else a for i, a in enumerate(arguments)))

    return called


def _one_sequence(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return varlen attention for one sequence of all tokens: there are no values to read boundaries from."""

    def called(*arguments: Any) -> Any:
        return function(*([0, arguments[0].shape[0]] if i == place else a for i, a in enumerate(arguments)))

    return called


OUR_OPS = {
    **products.BODIES,
    **grouped.BODIES,
    torch.ops.fsdp_qlora.attention.default: _every_key(blockwise.BODIES[torch.ops.fsdp_qlora.attention.default], 3),
    torch.ops.fsdp_qlora.attention_backward.default: _every_key(
        blockwise.BODIES[torch.ops.fsdp_qlora.attention_backward.default], 5
    ),
    torch.ops.fsdp_qlora.varlen_attention.default: _one_sequence(varlen.forward, 3),
    torch.ops.fsdp_qlora.varlen_attention_backward.default: _one_sequence(varlen.backward, 5),
}
"""Our own ops -> their implementation, whose allocations count too."""


def _evenly(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    count = num_experts(self)
    each, more = divmod(top_k_index.numel(), count)
    counts = [each + (expert < more) for expert in range(count)]
    return experts_by_counts(self, hidden_states, top_k_index, top_k_weights, counts)
