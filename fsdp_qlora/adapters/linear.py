"""`QuantLoraLinear`: LoRA on a frozen quantized linear, with base and adapter fused into one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER
from fsdp_qlora.errors import ModelError
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

    def forward(self, x: torch.Tensor, adapter_names: Sequence[str] | None = None) -> torch.Tensor:
        """Return ``[..., out_features]`` for ``[..., in_features]``.

        ``adapter_names`` names the adapter of each row of ``x``. PEFT passes it in a forward of several adapters; a
        name that this layer has no adapter of (``__base__`` among them) means the base alone.

        Raises:
            ModelError: if there is not one name a row.
        """
        if adapter_names is not None:
            return self._by_row(x, adapter_names)
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
                out = out + self._change(x, name)
        return out

    def _change(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return what the adapter ``name`` adds to the base's product of ``x``."""
        # Adapters that FSDP does not gather (fsdp.adapters=replicated) are float32 here.
        down, up = (cast(torch.Tensor, m[name].weight).to(x.dtype) for m in (self.lora_A, self.lora_B))
        low = nn.functional.linear(self.lora_dropout[name](x), down)
        return nn.functional.linear(low, up) * self.scaling[name]

    def _by_row(self, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        """Return the product of each row with the base and the adapter of its name."""
        if len(adapter_names) != len(x):
            raise ModelError(
                f"adapter_names: {len(adapter_names)} names for {len(x)} rows; give one for each row of the batch "
                "(beams and several answers a row are rows)."
            )
        out = self.base_layer(x)
        if self.disable_adapters:
            return out
        for name in dict.fromkeys(adapter_names):
            if name in self.lora_A:
                rows = torch.tensor([i for i, own in enumerate(adapter_names) if own == name], device=x.device)
                out = out.index_add(0, rows, self._change(x.index_select(0, rows), name))
        return out


def products(layers: Sequence[QuantLoraLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's product of ``x`` with base and adapter, without biases, as one op."""
    down = [cast(torch.Tensor, layer.lora_A[ADAPTER].weight) for layer in layers]
    up = [cast(torch.Tensor, layer.lora_B[ADAPTER].weight) for layer in layers]
    matrices = [cast(QuantLinear, layer.base_layer).for_product(x) for layer in layers]
    return multiply(x, matrices, down, up, [layer.scaling[ADAPTER] for layer in layers])


class SharedInput:
    """Layers that read the same input (queries, keys and values): the first one called computes the products of all.

    Results are used only for the very tensor they were computed from. So a layer that in fact reads another input is
    still correct, only slower.
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

    @property
    def idle(self) -> bool:
        """Whether every product that was computed has been used."""
        return not self._made


SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of the same module that read the same input in transformers' models."""
_CROSS_ATTENTION, _OF_ENCODER = "encoder_attn", (("k_proj", "v_proj"),)
"""Name of the module, in encoder-decoders, whose queries read another input than keys and values."""


def use_fused_products(model: nn.Module) -> list[SharedInput]:
    """Fuse base and adapter into one product, and linears that share an input into one call.

    Returns the groups of the latter. Adapters with dropout stay unfused: it applies to the adapter's input only.
    """
    groups = []
    for parent in list(model.modules()):
        if isinstance(parent, QuantLoraLinear):
            dropout = dict(parent.lora_dropout.items()).get(ADAPTER)
            parent.fused = dropout is not None and not (isinstance(dropout, nn.Dropout) and dropout.p > 0)
    for path, parent in list(model.named_modules()):
        for names in _OF_ENCODER if path.endswith(f".{_CROSS_ATTENTION}") else SHARED_INPUTS:
            linears = [m for n in names if isinstance(m := getattr(parent, n, None), QuantLoraLinear) and m.fused]
            if len(linears) > 1 and len({(m.in_features, m.get_base_layer().quant_format) for m in linears}) == 1:
                groups.append(SharedInput(linears))
    return groups
