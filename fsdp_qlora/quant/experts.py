"""The experts of a mixture-of-experts layer with 4-bit weights, run through transformers' own experts interface.

A transformers experts module keeps its routing, gate and activation; only its stacked weights are `QuantMatrices`, and
the forward registered here multiplies with one expert at a time, so one dense expert exists at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fsdp_qlora.quant.matrices import QuantMatrices

EXPERTS_IMPLEMENTATION = "fsdp_qlora_4bit"
"""Name of `experts_forward` in transformers' experts interface."""


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``.

    Args:
        self: the experts module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``.
    """
    up, down = first_matrices(self), self.down_proj
    order = top_k_index.reshape(-1).argsort(stable=True)
    tokens = order // top_k_index.shape[-1]
    parts = hidden_states[tokens].split(_tokens_per_expert(self, top_k_index, up.count))
    found = []
    for expert, part in enumerate(parts):
        if part.shape[0] == 0:
            continue
        inner = up.matmul(part, expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        found.append(down.matmul(inner, expert))
    weighted = torch.cat(found) * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden_states).index_add_(0, tokens, weighted.to(hidden_states.dtype))


def _tokens_per_expert(module: Any, top_k_index: torch.Tensor, count: int) -> list[int]:
    if getattr(module, "spread_evenly", False):  # a simulated step: there are no numbers to route by
        each, more = divmod(top_k_index.numel(), count)
        return [each + (expert < more) for expert in range(count)]
    return torch.bincount(top_k_index.reshape(-1), minlength=count).tolist()


def spread_evenly(model: nn.Module) -> None:
    """Let every expert of ``model`` take as many tokens: for a simulated step, which has no numbers to route by."""
    for module in model.modules():
        if isinstance(getattr(module, "down_proj", None), QuantMatrices) and hasattr(module, "has_gate"):
            module.spread_evenly = True  # type: ignore[assignment]


def first_matrices(module: nn.Module) -> QuantMatrices:
    """Return an experts module's gate and up projection, or its up projection where it has no gate."""
    return module.gate_up_proj if module.has_gate else module.up_proj  # type: ignore[return-value]
