"""The methods that PEFT's own layers compute; `config/choices.py` lists the options of each.

Methods whose layers multiply by the base layer (all but HRA and SHiRA) use our product; these two, and DoRA's norms,
read the dequantized ``weight``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft import (
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    VeraConfig,
)
from peft.tuners.shira.mask_functions import random_mask
from torch import nn
from torch.nn.utils import skip_init

from fsdp_qlora.adapters.method import register
from fsdp_qlora.adapters.names import ADAPTER, adapter_key
from fsdp_qlora.adapters.peft_layers import CPU, adapted_layers, has_adapter
from fsdp_qlora.adapters.peft_method import PeftMethod
from fsdp_qlora.adapters.saved import Kept
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.shapes.linears import LinearShape


@register
class IA3(PeftMethod):
    """(IA)^3 (https://arxiv.org/abs/2205.05638): outputs, or the inputs of ``feedforward_modules``, times a factor."""

    name = "ia3"
    config = IA3Config

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> PeftConfig:
        """Return the PEFT config, in which feed-forward modules are named like the targets that they are."""
        endings = tuple(lora.options.get("feedforward_modules") or ())
        inner = [t for t in targets if any(t == e or t.endswith(f".{e}") for e in endings)]
        return IA3Config(task_type=task_type, target_modules=list(targets), feedforward_modules=inner)  # type: ignore[arg-type]


class _SharedProjections(PeftMethod):
    """A method with two random matrices that all layers share: buffers, whole on every rank, once in memory and file.

    They come from ``projection_prng_key``, in the compute dtype, as in PEFT. A second adapter would take them from the
    first one's layers (PEFT 0.21).
    """

    alone = True

    def fixed(self, model: nn.Module, lora: LoraSettings, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
        """Return the projections, unless ``save_projection`` is off."""
        if not lora.options.get("save_projection", True):
            return {}
        layer = next(iter(adapted_layers(model).values()))
        return {f"base_model.{name}": getattr(layer, name)[adapter] for name in self.shared}


def _largest(linears: Sequence[LinearShape]) -> tuple[int, int]:
    return max(x.out_features for x in linears), max(x.in_features for x in linears)


@register
class VeRA(_SharedProjections):
    """VeRA (https://arxiv.org/abs/2310.11454): trained vectors around two shared random projections."""

    name = "vera"
    config = VeraConfig
    keys: ClassVar = {"r": "r", "dropout": "vera_dropout"}
    shared = ("vera_A", "vera_B")

    def fixed_bytes(self, linears: Sequence[LinearShape], lora: LoraSettings, itemsize: int) -> int:
        """Return the bytes of both projections, which fit the largest linears."""
        return lora.r * sum(_largest(linears)) * itemsize


@register
class OFT(PeftMethod):
    """OFT (https://arxiv.org/abs/2306.07280, Cayley-Neumann: https://arxiv.org/abs/2506.19847): rotated inputs."""

    name = "oft"
    config = OFTConfig
    small: ClassVar = {"oft_block_size": 4}


@register
class MiSS(PeftMethod):
    """MiSS (https://arxiv.org/abs/2409.15371): one trained block for all blocks of inputs."""

    name = "miss"
    config = MissConfig
    keys: ClassVar = {"r": "r", "dropout": "miss_dropout"}


@register
class LoHa(PeftMethod):
    """LoHa (https://arxiv.org/abs/2108.06098): the Hadamard product of two low-rank products."""

    name = "loha"
    config = LoHaConfig
    simulates = False
    keys: ClassVar = {"r": "r", "alpha": "alpha"}
    random_start = True


@register
class LoKr(PeftMethod):
    """LoKr (https://arxiv.org/abs/2309.14859): a Kronecker product."""

    name = "lokr"
    config = LoKrConfig
    simulates = False
    keys: ClassVar = {"r": "r", "alpha": "alpha"}
    random_start = True


@register
class HRA(PeftMethod):
    """HRA (https://arxiv.org/abs/2405.17484): Householder reflections of the inputs; ``r`` must be even."""

    name = "hra"
    config = HRAConfig
    keys: ClassVar = {"r": "r"}
    random_start = True


def _mask_of_values(base_layer: nn.Linear, r: int, **settings: Any) -> torch.Tensor:
    """Return upstream's random mask, on the CPU even if the base layer is on meta."""
    size = base_layer.in_features, base_layer.out_features
    return random_mask(skip_init(nn.Linear, *size, bias=False, device=CPU), r, **settings)


@register
class SHiRA(PeftMethod):
    """SHiRA (https://arxiv.org/abs/2406.13175): trained values at random places of the weight."""

    name = "shira"
    config = ShiraConfig
    keys: ClassVar = {"r": "r"}
    simulates = False
    always: ClassVar = {"random_seed": 0}  # PEFT's default is a mask that differs from rank to rank

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> PeftConfig:
        """Return the PEFT config."""
        config = super().peft(targets, lora, task_type)
        config.mask_fn = _mask_of_values  # type: ignore[attr-defined]
        return config

    def kept(self, linear: LinearShape, lora: LoraSettings) -> Kept:
        """Return the size of the change of the weight, which PEFT makes dense; meta has no sparse tensors."""
        return Kept(linear.numel)

    def fixed_bytes(self, linears: Sequence[LinearShape], lora: LoraSettings, itemsize: int) -> int:
        """Return the bytes of two int32 for each trained value."""
        return 8 * sum(lora.r * (x.in_features + x.out_features) for x in linears)

    def tensor_names(self) -> set[str]:
        """Return the names of the values and of their places."""
        return super().tensor_names() | {"shira_indices"}

    def fixed(self, model: nn.Module, lora: LoraSettings, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
        """Return the places of the trained values."""
        layers = [(name, layer) for name, layer in adapted_layers(model).items() if has_adapter(layer, adapter)]
        return {adapter_key(f"{name}.shira_indices"): layer.shira_indices[adapter] for name, layer in layers}  # type: ignore[attr-defined]


@register
class RoAd(PeftMethod):
    """RoAd (https://arxiv.org/abs/2409.00119): pairs of outputs, rotated and scaled."""

    name = "road"
    config = RoadConfig
    small: ClassVar = {"group_size": 2}


@register
class RandLoRA(_SharedProjections):
    """RandLoRA (https://arxiv.org/abs/2502.00987): full-rank combinations of shared random bases."""

    name = "randlora"
    config = RandLoraConfig
    keys: ClassVar = {"r": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"}
    shared = ("randlora_A", "randlora_B")

    def fixed_bytes(self, linears: Sequence[LinearShape], lora: LoraSettings, itemsize: int) -> int:
        """Return the bytes of the bases: one for all, and as many as give full rank."""
        small, large = sorted(_largest(linears))
        return lora.r * (small + large * -(-small // lora.r)) * itemsize


@register
class C3A(PeftMethod):
    """C3A (https://arxiv.org/abs/2407.19342): block-circular convolution."""

    name = "c3a"
    config = C3AConfig
    random_start = True
    small: ClassVar = {"block_size": 4}


@register
class FourierFT(PeftMethod):
    """FourierFT (https://arxiv.org/abs/2405.03003): trained frequencies of the weight's change."""

    name = "fourierft"
    config = FourierFTConfig
    random_start = True
    small: ClassVar = {"n_frequency": 16}
