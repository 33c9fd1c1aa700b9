"""LoRA (https://arxiv.org/abs/2106.09685) and rsLoRA (https://arxiv.org/abs/2312.03732) on a meta model.

PEFT provides the config, the file format and the adapter modules. Our quantized layer is registered with its dispatcher
through ``LoraConfig._register_custom_module`` (private; `tests/unit/test_lora.py` fails if it breaks).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from fsdp_qlora.adapters.experts import attach_experts
from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.adapters.method import Method, build_method, plain_number, register, spelt_out
from fsdp_qlora.adapters.names import ADAPTER, adapter_parameters
from fsdp_qlora.adapters.norms import keep_norms
from fsdp_qlora.adapters.peft_layers import refuse_merging, restore_buffers
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import NumericsError, PlanError
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.shapes.linears import LinearShape

AdaptedModel = PeftModel
"""What `attach_adapters` returns."""


@register
class LoRA(Method):
    """``base(x) + B(A(x)) * alpha / r``."""

    name = "lora"
    layer = QuantLoraLinear

    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B; for stacked matrices, those of all matrices together.

        Those of an embedding are turned: its input is a token, its output a row.
        """
        r = linear.count * lora.r
        if linear.lookup:
            return {"lora_embedding_A": (r, linear.out_features), "lora_embedding_B": (linear.in_features, r)}
        return {"lora_A.weight": (r, linear.in_features), "lora_B.weight": (linear.out_features, r)}

    def tensor_names(self) -> set[str]:
        """Return the names that tensors of a target have in PEFT's file, after the target's name."""
        return super().tensor_names() | self._of_table()

    def tensors_with(self, names: Collection[str]) -> set[str]:
        """Return the names of all tensors of a target that has the ones called ``names``: a linear, or an embedding."""
        linear, table = super().tensor_names(), self._of_table()
        return table if table.intersection(names) - linear else linear

    def _of_table(self) -> set[str]:
        return set(self.shapes(LinearShape("any", 1, 1, lookup=True), LoraSettings()))

    @property
    def honoured(self) -> frozenset[str]:
        """The keys of an adapter_config.json that this method's settings express."""
        return super().honoured | {"bias"}

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """Return the PEFT config."""
        return lora_config(targets, lora, task_type)

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether it scales by alpha / r."""
        return is_lora(config) and not config.get("use_rslora", False) and config.get("use_dora") is not True

    def initial(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Return PEFT's initial value: A uniform as in `nn.Linear`, B zero; of an embedding, A zero and B normal."""
        if ".lora_B." in name or name.endswith(".lora_embedding_A"):
            return None
        if name.endswith(".lora_embedding_B"):
            return torch.empty(tuple(shape), dtype=torch.float32).normal_(generator=generator)
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
        return lora_config(targets, lora, task_type, use_rslora=True)

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether it scales by alpha / sqrt(r)."""
        return is_lora(config) and config.get("use_rslora", False) is True and config.get("use_dora") is not True


def lora_config(targets: Sequence[str], lora: LoraSettings, task_type: str | None, **switches: Any) -> LoraConfig:
    """Return PEFT's config of a kind of LoRA; ``switches`` say which.

    Patterns must be spelt out (`spelt_out`): PEFT's are regular expressions.
    """
    return LoraConfig(
        task_type=task_type,  # type: ignore[arg-type]
        target_modules=list(targets),
        r=lora.r,
        lora_alpha=plain_number(lora.alpha),  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        bias=lora.bias,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={name: plain_number(alpha) for name, alpha in lora.alpha_pattern.items()},
        **switches,
    )


def is_lora(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is of a kind of LoRA."""
    return config.get("peft_type") == "LORA"


def attach_lora(
    model: nn.Module, target_modules: Sequence[str], r: int, alpha: float, dropout: float = 0.0,
    variant: str = "lora", task_type: str | None = "CAUSAL_LM",
) -> PeftModel:  # fmt: skip
    """Add LoRA adapters to the named linears; see `attach_adapters`, which takes all settings.

    ``task_type`` is PEFT's name of what the model does; None for a model that has no such name.
    """
    return attach_adapters(
        model, target_modules, LoraSettings(variant=variant, r=r, alpha=alpha, dropout=dropout), task_type
    )


def attach_adapters(
    model: nn.Module, target_modules: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM",
    parameters: Sequence[LinearShape] = (), name: str = ADAPTER,
) -> AdaptedModel:  # fmt: skip
    """Add adapters (float32, on meta) to the named linears of a meta model and freeze everything else.

    They are also added to the stacked weights ``parameters``, which are in the model's order; the model must run our
    experts' forward (`use_experts_forward`).

    A method with a layer of its own is attached after `swap_linears`, one that PEFT's layers compute before it.
    """
    spelt = spelt_out(lora, [*target_modules, *(x.name for x in parameters)])
    config = _attachable(model, target_modules, spelt, task_type)
    with _expected_warnings():
        peft_model = get_peft_model(model, config, name, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    assert isinstance(peft_model, PeftModel)
    attach_experts(model, parameters, lora)
    _settle(peft_model, config, lora, name)
    return peft_model


def attach_another(
    peft_model: AdaptedModel, target_modules: Sequence[str], lora: LoraSettings, task_type: str | None, name: str
) -> None:
    """Add another adapter, inactive and frozen, under its own name; before sharding, as `attach_adapters`."""
    config = _attachable(peft_model.get_base_model(), target_modules, spelt_out(lora, target_modules), task_type)
    with _expected_warnings():
        peft_model.add_adapter(name, config, low_cpu_mem_usage=True)
    _settle(peft_model, config, lora, name)


def _attachable(
    model: nn.Module, target_modules: Sequence[str], lora: LoraSettings, task_type: str | None
) -> PeftConfig:
    """Return the PEFT config of an adapter with patterns spelt out, and our layer registered if the method has one."""
    method = build_method(lora.method)
    config = method.peft(target_modules, lora, task_type)
    if method.layer is None:
        modules = dict(model.named_modules())
        if any(isinstance(modules.get(name), QuantLinear) for name in target_modules):
            raise PlanError(f"{lora.variant}: attach it before swap_linears; PEFT's layers go on dense linears.")
    else:
        assert isinstance(config, LoraConfig)
        config._register_custom_module({QuantLinear: method.layer})
    return config


@contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft warns that merging would have to untie the embedding; we neither target nor merge it here
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type .*QuantLinear")  # it is registered
        warnings.filterwarnings("ignore", message="Adapter name .* should not be contained in the prefix")
        yield


def _settle(peft_model: PeftModel, config: PeftConfig, lora: LoraSettings, name: str) -> None:
    """Make an attached adapter float32, and give PEFT's layers what attaching on meta took from them."""
    for _, parameter in adapter_parameters(peft_model, name):
        parameter.data = parameter.data.float()
    if build_method(lora.method).layer is None:
        restore_buffers(peft_model, config, name)
        refuse_merging(peft_model)
        keep_norms(peft_model)


def initialize_adapters(
    model: nn.Module, seed: int, shard_rank: int = 0, shard_size: int = 1, lora: LoraSettings | None = None
) -> None:
    """Initialize each trained tensor as its method prescribes, with a seed derived from its name.

    Each tensor is drawn whole on the CPU and then sliced, so values do not depend on the number of ranks. Matrices that
    start from the base weights (`LoraSettings.start`) have their values already.
    """
    lora = lora or LoraSettings()
    method = build_method(lora.method)
    if lora.start is None:
        method.initialize(model, lora, seed, shard_rank, shard_size)
    else:
        method.initialize_rest(model, lora, shard_rank, shard_size)
