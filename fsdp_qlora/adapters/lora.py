"""LoRA (https://arxiv.org/abs/2106.09685) and rsLoRA (https://arxiv.org/abs/2312.03732) on a meta model.

PEFT provides the config, the file format and the adapter modules. Our quantized layer is registered with its dispatcher
through ``LoraConfig._register_custom_module`` (private; `tests/unit/test_lora.py` fails if it breaks).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.adapters.method import Method, build_method, register
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.shards import fill_slice, local_tensor
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.shapes.linears import LinearShape
from fsdp_qlora.shapes.tokens import TOKEN_ROWS


@register
class LoRA(Method):
    """``base(x) + B(A(x)) * alpha / r``."""

    name = "lora"
    layer = QuantLoraLinear

    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B; for stacked matrices, those of all matrices together."""
        r = linear.count * lora.r
        return {"lora_A.weight": (r, linear.in_features), "lora_B.weight": (linear.out_features, r)}

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """Return the PEFT config."""
        return LoraConfig(
            task_type=task_type,  # type: ignore[arg-type]
            target_modules=list(targets),
            r=lora.r,
            lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
        )

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether it scales by alpha / r."""
        return not config.get("use_rslora", False)

    def initial(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Return PEFT's initial value: A uniform as in `nn.Linear`, B zero."""
        if ".lora_B." in name:
            return None
        if ".lora_A." not in name:
            raise NumericsError(f"{name}: no initialisation is known for this trainable parameter.")
        bound = shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)), as in PEFT and nn.Linear
        return torch.empty(tuple(shape), dtype=torch.float32).uniform_(-bound, bound, generator=generator)


@register
class RsLoRA(LoRA):
    """``base(x) + B(A(x)) * alpha / sqrt(r)``."""

    name = "rslora"

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """Return the PEFT config; PEFT computes the scaling from it."""
        config = super().peft(targets, lora, task_type)
        config.use_rslora = True
        return config

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether it scales by alpha / sqrt(r)."""
        return config.get("use_rslora", False) is True


def attach_lora(
    model: PreTrainedModel, target_modules: Sequence[str], r: int, alpha: float, dropout: float = 0.0,
    variant: str = "lora", task_type: str | None = "CAUSAL_LM",
) -> PeftModel:  # fmt: skip
    """Add LoRA adapters to the named linears; see `attach_adapters`, which takes all settings."""
    return attach_adapters(
        model, target_modules, LoraSettings(variant=variant, r=r, alpha=alpha, dropout=dropout), task_type
    )


def attach_adapters(
    model: PreTrainedModel, target_modules: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM"
) -> PeftModel:
    """Add adapters (float32, on meta) to the named linears of a meta model and freeze everything else."""
    method = build_method(lora.variant)
    config = method.peft(target_modules, lora, task_type)
    config._register_custom_module({QuantLinear: method.layer})
    with warnings.catch_warnings():
        # peft warns that merging would have to untie the embedding; we neither target nor merge it here
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type .*QuantLinear")  # it is registered above
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


@torch.no_grad()
def initialize_adapters(
    model: nn.Module, seed: int, shard_rank: int = 0, shard_size: int = 1, variant: str = "lora"
) -> None:
    """Initialize each trained tensor as its method prescribes, with a seed derived from its name.

    Each tensor is drawn whole on the CPU and then sliced, so values do not depend on the number of ranks.
    """
    method = build_method(variant)
    for name, parameter in trainable_parameters(model):
        if name.endswith(TOKEN_ROWS):  # they start from the base's rows, which the method does not know
            continue
        whole = method.initial(name, parameter.shape, torch.Generator().manual_seed(seed_of(seed, name)))
        if whole is None:
            local_tensor(parameter).zero_()
        else:
            fill_slice(parameter, whole, shard_rank, shard_size)
