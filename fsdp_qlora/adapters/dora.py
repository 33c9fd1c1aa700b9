"""DoRA (https://arxiv.org/abs/2402.09353) in PEFT's own layer, with norms that are kept for a step (`StepNorms`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from fsdp_qlora.adapters.lora import LoRA, is_lora, lora_config
from fsdp_qlora.adapters.method import register
from fsdp_qlora.adapters.names import ADAPTER
from fsdp_qlora.adapters.norms import keep_norms
from fsdp_qlora.adapters.peft_layers import META, layers_alone
from fsdp_qlora.adapters.saved import Kept, kept_by
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.gathered import gathered_units
from fsdp_qlora.distributed.shards import fill_slice
from fsdp_qlora.shapes.linears import LinearShape

_MAGNITUDE = "lora_magnitude_vector"


@register
class DoRA(LoRA):
    """LoRA whose sum with the weight is normalised, times a trained magnitude for each output."""

    name = "dora"
    layer = None

    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B and the magnitudes."""
        return super().shapes(linear, lora) | {_MAGNITUDE: (linear.out_features,)}

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """Return the PEFT config."""
        return lora_config(targets, lora, task_type, use_dora=True, use_rslora=lora.scales_by_root)

    def kept(self, linear: LinearShape, lora: LoraSettings) -> Kept:
        """Return what PEFT's layer keeps, with norms that are constants."""
        last, size = linear.name.rpartition(".")[2], (linear.out_features, linear.in_features)

        def build() -> Any:
            layer = layers_alone(self.peft([last], lora, None), {last: size}, META)[last]
            keep_norms(layer)
            return layer

        return kept_by(self.name, linear, lora, build)

    def fixed_bytes(self, linears: Sequence[LinearShape], lora: LoraSettings, itemsize: int) -> int:
        """Return the bytes of the norms, which every rank keeps whole."""
        return itemsize * sum(linear.out_features for linear in linears)

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether it is DoRA."""
        return is_lora(config) and config.get("use_dora") is True

    def settings(self, config: Mapping[str, Any]) -> LoraSettings:
        """Return the settings, without targets, that an adapter_config.json of DoRA expresses."""
        return replace(super().settings(config), use_rslora=config.get("use_rslora", False) or None)

    @property
    def honoured(self) -> frozenset[str]:
        """The keys of an adapter_config.json that this method's settings express."""
        return super().honoured | {"use_dora"}

    def initial(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Return LoRA's initial value; magnitudes depend on the weight, see `initialize`."""
        return None if name.endswith(_MAGNITUDE) else super().initial(name, shape, generator)

    @torch.no_grad()
    def initialize(self, model: nn.Module, lora: LoraSettings, seed: int, shard_rank: int, shard_size: int) -> None:
        """Give every trained tensor its initial value: the magnitudes are the norms of the weight's rows.

        A collective: units are gathered one by one.
        """
        super().initialize(model, lora, seed, shard_rank, shard_size)
        self.initialize_rest(model, lora, shard_rank, shard_size)

    @torch.no_grad()
    def initialize_rest(self, model: nn.Module, lora: LoraSettings, shard_rank: int, shard_size: int) -> None:
        """Give the magnitudes the norms of the rows of ``W + s B A``. A collective."""
        norms: dict[nn.Module, torch.Tensor] = {}
        for modules in gathered_units(model):
            for layer in (module for module in modules if isinstance(module, Linear)):
                weight = layer.get_base_layer().weight.float()
                if lora.start is not None:  # else B is zero
                    a, b = (
                        layer.get_submodule(f"{kind}.{ADAPTER}").get_parameter("weight").float()
                        for kind in ("lora_A", "lora_B")
                    )
                    weight = weight + layer.scaling[ADAPTER] * (b @ a)
                norms[layer] = torch.linalg.norm(weight, dim=1)
        for layer, norm in norms.items():
            magnitude = layer.get_submodule(f"{_MAGNITUDE}.{ADAPTER}").get_parameter("weight")
            fill_slice(magnitude, norm, shard_rank, shard_size)
