"""Mixture-of-experts layers with 4-bit weights, through transformers' own experts interface.

A transformers experts module keeps its routing, gate and activation; only its stacked weights become `QuantMatrices`.
The forward registered here runs one expert at a time, so at most one expert is dense at any moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fsdp_qlora.quant.matrices import QuantMatrices

EXPERTS_IMPLEMENTATION = "fsdp_qlora_4bit"
"""Name of `experts_forward` in transformers' experts interface."""


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``; see `experts_by_counts`."""
    return experts_by_counts(self, hidden_states, top_k_index, top_k_weights, _tokens_per_expert)


def experts_by_counts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
    counts: Callable[[torch.Tensor, int], list[int]],
) -> torch.Tensor:  # fmt: skip
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``.

    Args:
        self: the experts module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``.
        counts: returns the number of tokens for each expert, given ``top_k_index`` and the number of experts.
    """
    up, down = first_matrices(self), self.down_proj
    # (token, slot) pairs, flattened and sorted by expert: each expert's tokens become one contiguous run
    order = top_k_index.reshape(-1).argsort(stable=True)
    tokens = order // top_k_index.shape[-1]
    parts = hidden_states[tokens].split(counts(top_k_index, up.count))
    outputs = []
    for expert, part in enumerate(parts):
        if part.shape[0] == 0:
            continue
        inner = up.matmul(part, expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outputs.append(down.matmul(inner, expert))
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden_states).index_add_(0, tokens, weighted.to(hidden_states.dtype))


def _tokens_per_expert(top_k_index: torch.Tensor, count: int) -> list[int]:
    chosen = top_k_index.reshape(-1)
    counts = chosen.new_zeros(count)  # not `bincount`, which waits for the device to learn the largest index
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen)).tolist()


def first_matrices(module: nn.Module) -> QuantMatrices:
    """Return an experts module's gate and up projection, or its up projection if it has no gate."""
    return module.gate_up_proj if module.has_gate else module.up_proj  # type: ignore[return-value]
