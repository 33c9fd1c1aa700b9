"""`QuantLoraLinear`: LoRA on a frozen quantized linear, with base and adapter fused into one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.products import multiply


class QuantLoraLinear(nn.Module, LoraLayer):
    """LoRA on a `QuantLinear`: ``base(x) + B(A(dropout(x))) * scaling`` (LoRA, https://arxiv.org/abs/2106.09685).

    Attributes:
        fused: whether base and adapter run as one op (`quant/products.py`) or separately, as in PEFT. Dropout on the
            adapter's input requires the latter.
        sharing: the group of layers that read the same input, if any.
    """

    def __init__(
        self, base_layer: QuantLinear, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.fused = False
        self.sharing: SharedInput | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out_features]`` for ``[..., in_features]``."""
        if not self.fused or self.disable_adapters or self.active_adapters != [ADAPTER]:
            return self._apart(x)
        out = products([self], x)[0] if self.sharing is None else self.sharing.product(self, x)
        bias = self.base_layer.bias
        return out if bias is None else out + bias  # type: ignore[operator]

    def _apart(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.lora_A:
                # Adapters that FSDP does not gather (fsdp.adapters=replicated) are float32 here.
                down, up = (cast(torch.Tensor, m[name].weight).to(x.dtype) for m in (self.lora_A, self.lora_B))
                low = nn.functional.linear(self.lora_dropout[name](x), down)
                out = out + nn.functional.linear(low, up) * self.scaling[name]
        return out


def products(layers: Sequence[QuantLoraLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's product of ``x`` with base and adapter, without biases, as one op."""
    down = [cast(torch.Tensor, layer.lora_A[ADAPTER].weight) for layer in layers]
    up = [cast(torch.Tensor, layer.lora_B[ADAPTER].weight) for layer in layers]
    matrices = [cast(QuantLinear, layer.base_layer).for_product(x) for layer in layers]
    return multiply(x, matrices, down, up, [layer.scaling[ADAPTER] for layer in layers])


class SharedInput:
    """Layers that read the same input (queries, keys and values): the first one called computes the products of all.

    Results are used only for the very tensor they were computed from. So a layer that in fact reads another input
    (cross-attention) is still correct, only slower.
    """

    def __init__(self, layers: Sequence[QuantLoraLinear]) -> None:
        self.layers = tuple(layers)
        self._input: torch.Tensor | None = None
        self._made: dict[int, torch.Tensor] = {}
        for layer in layers:
            layer.sharing = self

    def product(self, layer: QuantLoraLinear, x: torch.Tensor) -> torch.Tensor:
        """Return the product for ``layer`` and drop it from the cache."""
        place = self.layers.index(layer)
        if self._input is not x or place not in self._made:
            self._input, self._made = x, dict(enumerate(products(self.layers, x)))
        product = self._made.pop(place)
        if not self._made:
            self._input = None
        return product


SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of the same module that read the same input in transformers' models."""


def use_fused_products(model: nn.Module) -> list[SharedInput]:
    """Fuse base and adapter into one product, and linears that share an input into one call.

    Returns the groups of the latter. Adapters with dropout stay unfused: it applies to the adapter's input only.
    """
    groups = []
    for parent in list(model.modules()):
        if isinstance(parent, QuantLoraLinear):
            dropout = parent.lora_dropout[ADAPTER]
            parent.fused = not (isinstance(dropout, nn.Dropout) and dropout.p > 0)
    for parent in list(model.modules()):
        for names in SHARED_INPUTS:
            linears = [m for n in names if isinstance(m := getattr(parent, n, None), QuantLoraLinear) and m.fused]
            if len(linears) > 1 and len({(m.in_features, m.get_base_layer().quant_format) for m in linears}) == 1:
                groups.append(SharedInput(linears))
    return groups
