"""Mixture-of-experts layers with quantized weights or adapters, through transformers' own experts interface.

A transformers experts module keeps its routing, gate, activation and biases; only its stacked weights become
`QuantMatrices`. The forward registered here sorts the tokens by expert and multiplies all of them at once
(`quant/grouped.py`). Adapters on the stacked weights are found in ``stacked_adapters``, which whoever wraps the module
sets on it (`set_adapter`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.quant.grouped import grouped_product
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.stack import Stack

EXPERTS_IMPLEMENTATION = "fsdp_qlora_4bit"
"""Name of `experts_forward` in transformers' experts interface."""
_ADAPTERS = "stacked_adapters"


class StackedAdapter(Protocol):
    """An adapter on stacked weights."""

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and the factor of their product (see `grouped_product`), or None if it is switched off."""
        ...


def set_adapter(experts: nn.Module, key: str, adapter: StackedAdapter) -> None:
    """Let `experts_forward` add ``adapter`` to the stacked weights called ``key`` of an experts module.

    It is kept in a dict, where torch does not look for modules: the adapter is a module around ``experts``.
    """
    if not hasattr(experts, _ADAPTERS):
        setattr(experts, _ADAPTERS, {})
    getattr(experts, _ADAPTERS)[key] = adapter


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``; see `experts_by_counts`."""
    return experts_by_counts(self, hidden_states, top_k_index, top_k_weights, [])


def experts_by_counts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, counts: list[int]
) -> Tensor:
    """Return each token's weighted sum over its experts, ``[tokens, hidden]``.

    Args:
        self: the experts module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``.
        counts: the number of tokens for each expert; empty: read from ``top_k_index``.
    """
    k, chosen = top_k_index.shape[-1], top_k_index.reshape(-1)
    # (token, slot) pairs, flattened and sorted by expert: each expert's tokens become one contiguous run
    order = chosen.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    # not `bincount`, which waits for the device to learn the largest index
    rows = chosen.new_zeros(num_experts(self)).scatter_add_(0, chosen, torch.ones_like(chosen))
    ends = rows.cumsum(0).to(torch.int32)

    def product(x: Tensor, key: str) -> Tensor:
        stack = _stack(self, key, x.dtype)
        adapter = getattr(self, _ADAPTERS, {}).get(key)
        made = grouped_product(x, stack, ends, counts, adapter and adapter.factors())
        return made + getattr(self, f"{key}_bias")[chosen[order]] if self.has_bias else made

    inner = product(_Rows.apply(hidden_states, order, place, k), _first(self))
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outputs = product(inner, "down_proj")
    if self.has_post_expert_norm:
        outputs = self.post_expert_norm(outputs)
    weighted = _Rows.apply(outputs * top_k_weights.reshape(-1)[order, None], place, order, 1)
    return weighted.view(-1, k, outputs.shape[-1]).sum(1).to(hidden_states.dtype)


class _Rows(torch.autograd.Function):
    """``x[order // k]``: its rows, k times each, in another order. Backward gathers as well, where torch would scatter.

    ``place`` is the inverse of ``order``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grads[0].index_select(0, place)
        return grad if ctx.k == 1 else grad.view(-1, ctx.k, grad.shape[1]).sum(1), None, None, None


def _first(module: Any) -> str:
    """Return the name of an experts module's gate and up projection, or its up projection if it has no gate."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def num_experts(module: Any) -> int:
    """Return the number of experts whose weights an experts module has."""
    weights = getattr(module, _first(module))
    return weights.count if isinstance(weights, QuantMatrices) else weights.shape[0]


def _stack(module: Any, key: str, dtype: torch.dtype) -> Stack:
    """Return stacked weights: quantized, or parameters of upstream's, ``[count, out, in]`` or transposed."""
    weights = getattr(module, key)
    if isinstance(weights, QuantMatrices):
        return weights.stack_for_product(dtype)
    dense = weights.transpose(1, 2) if module.is_transposed else weights
    count, out_features, in_features = dense.shape
    return Stack(count, out_features, in_features, None, build_format(), dense)
