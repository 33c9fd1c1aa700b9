"""`Method`: a kind of adapter trained on a frozen base.

A method defines an adapter's tensors, their initial values and its PEFT config; `Method.layer`, or PEFT's own layer,
computes. It is stateless and knows nothing of FSDP: shapes are unsharded, and each tensor is drawn whole and then
sliced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER, adapter_parameters
from fsdp_qlora.adapters.saved import Kept
from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.shards import fill_slice, local_tensor
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.shapes.linears import LinearShape
from fsdp_qlora.shapes.patterns import by_name, matches

PATTERNS = ("rank_pattern", "alpha_pattern")
"""Keys of PEFT's LoraConfig that give some targets another rank or alpha."""


class Method(ABC):
    """A kind of adapter on linears."""

    name: ClassVar[str]
    """Its name in ``lora.variant``."""
    layer: ClassVar[type[nn.Module] | None]
    """Wraps a quantized linear; PEFT constructs it with ``(base_layer, adapter_name, config=..., r=..., ...)``. None:
    PEFT's own layers compute. They are attached while the linears are still dense; the quantized ones are put under
    them, and their ``weight`` dequantizes."""
    config: ClassVar[type[PeftConfig]] = LoraConfig
    """PEFT's class of the config."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The tensors of PEFT's file that belong to no target: each exists once."""
    small: ClassVar[Mapping[str, Any]] = {}
    """``lora.options`` that fit linears of a few dozen features: the twin check's."""

    alone: ClassVar[bool] = False
    """Whether a base takes only one adapter of this method at a time."""
    trains_base: ClassVar[bool] = False
    """Whether it trains the base itself, and there are no adapters."""
    simulates: ClassVar[bool] = True
    """Whether ``plan.simulate`` can run it: not with sparse tensors, nor if the layer draws a number and reads it."""

    @abstractmethod
    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors of a target: name in PEFT's file, after the target's name -> shape.

        The plan, optimizer sizes and checkpoints use it; tensors are sharded along the first dimension.

        Raises:
            PlanError: if the settings do not fit the target.
        """

    @abstractmethod
    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None) -> PeftConfig:
        """Return the PEFT config: it determines the attached layers and adapter_config.json."""

    @abstractmethod
    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json belongs to this method."""

    @property
    def reads(self) -> frozenset[str]:
        """Which of ``r`` and ``alpha`` it reads."""
        return frozenset({"r", "alpha"})

    @property
    def honoured(self) -> frozenset[str]:
        """The keys of an adapter_config.json that this method's settings express."""
        return frozenset({"r", "lora_alpha", "use_rslora", *PATTERNS})

    def settings(self, config: Mapping[str, Any]) -> LoraSettings:
        """Return the settings, without targets, that an adapter_config.json of this method expresses.

        Values are as the file has them; the caller checks their types.
        """
        return LoraSettings(variant=self.name, r=config.get("r", 8), alpha=config.get("lora_alpha", 8))

    def tensor_names(self) -> set[str]:
        """Return the names that tensors of a target have in PEFT's file, after the target's name."""
        return set(self.shapes(LinearShape("any", 1, 1), LoraSettings()))

    def tensors_with(self, names: Collection[str]) -> set[str]:
        """Return the names of all tensors of a target that has the ones called ``names``."""
        return self.tensor_names()

    def initial(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Return the initial value of a trained tensor, float32 of ``shape``; None for zeros.

        Raises:
            NumericsError: if the method has no such tensor.
        """
        raise NumericsError(f"{name}: no initialisation is known for this trainable parameter.")

    @torch.no_grad()
    def initialize(self, model: nn.Module, lora: LoraSettings, seed: int, shard_rank: int, shard_size: int) -> None:
        """Give every trained tensor of a sharded model its initial value, from ``seed`` and its name."""
        for name, parameter in adapter_parameters(model, ADAPTER):  # the base has its values, or gives them
            if not parameter.requires_grad:
                continue
            whole = self.initial(name, parameter.shape, torch.Generator().manual_seed(seed_of(seed, name)))
            if whole is None:
                local_tensor(parameter).zero_()
            else:
                fill_slice(parameter, whole, shard_rank, shard_size)

    def initialize_rest(  # noqa: B027 (most methods have no others)
        self, model: nn.Module, lora: LoraSettings, shard_rank: int, shard_size: int
    ) -> None:
        """Give the trained tensors beside LoRA's matrices their values, where these start from the base weights."""

    def kept(self, linear: LinearShape, lora: LoraSettings) -> Kept:
        """Return what an adapter keeps from forward to backward besides the linear's input and output."""
        return Kept()

    def fixed_bytes(self, linears: Sequence[LinearShape], lora: LoraSettings, itemsize: int) -> int:
        """Return the bytes of the tensors that are never trained, in a model that computes with ``itemsize`` bytes."""
        return 0

    def fixed(self, model: nn.Module, lora: LoraSettings, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
        """Return what else PEFT's file holds, by name: tensors that are never trained, and equal on every rank.

        They are the tensors the model computes with, so loading an adapter writes into them.
        """
        return {}


def plain_number(value: float) -> int | float:
    """Return a whole number as an int, as PEFT writes alphas."""
    return int(value) if float(value).is_integer() else value


def parameters_of(method: Method, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return name in PEFT's file -> shape, for a target's trained tensors."""
    shapes = method.shapes(linear, of_target(lora, linear.name))
    return {f"base_model.model.{linear.name}.{name}": shape for name, shape in shapes.items()}


def of_target(lora: LoraSettings, name: str) -> LoraSettings:
    """Return the settings of the target ``name``: with its rank and alpha, and no patterns."""
    if not lora.rank_pattern and not lora.alpha_pattern:
        return lora
    r, alpha = ([value for pattern, value in patterns.items() if matches(name, pattern)]
                for patterns in (lora.rank_pattern, lora.alpha_pattern))  # fmt: skip
    return replace(
        lora, r=r[-1] if r else lora.r, alpha=alpha[-1] if alpha else lora.alpha, rank_pattern={}, alpha_pattern={}
    )


def scaling_of(lora: LoraSettings) -> float:
    """Return the factor of the product of LoRA's matrices, for a target's settings (`of_target`)."""
    return lora.alpha / (sqrt(lora.r) if lora.scales_by_root else lora.r)


def spelt_out(lora: LoraSettings, targets: Sequence[str]) -> LoraSettings:
    """Return the settings with a whole name for each target whose rank or alpha is not the common one, as for PEFT.

    Raises:
        PlanError: if a pattern means no target.
    """
    ranks = by_name("lora.rank_pattern", lora.rank_pattern, targets)
    alphas = by_name("lora.alpha_pattern", lora.alpha_pattern, targets)
    return replace(
        lora,
        rank_pattern={name: r for name, r in ranks.items() if r != lora.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != lora.alpha},
    )


_METHODS: choices.Registry[Method] = choices.Registry("adapter method", choices.METHODS)
register = _METHODS.register


def register_none(kind: type[Method]) -> type[Method]:
    """Register the absence of a method: found by its name, but none of the names that `choices.METHODS` lists."""
    _METHODS[kind.name] = kind
    return kind


def build_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    return _METHODS[name]()


def tensor_names() -> set[str]:
    """Return the tensor names of all methods, without their targets' names."""
    return {name for kind in _METHODS.values() for name in kind().tensor_names()}


def shared_names() -> set[str]:
    """Return the names in PEFT's files of the tensors, of any method, that belong to no target."""
    return {f"base_model.{name}" for kind in _METHODS.values() for name in kind.shared}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """Return the method that an adapter_config.json belongs to, or None."""
    return next((kind() for kind in _METHODS.values() if kind().recognizes(config)), None)
