"""`Method`: what is trained beside a frozen base.

A method says which tensors an adapter has, how they start, and what PEFT calls it; its `Method.layer` computes. It is
stateless and knows nothing of FSDP: shapes are whole, and each tensor is drawn whole and sliced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import nn

from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.shapes.linears import LinearShape


class Method(ABC):
    """A kind of adapter on linears."""

    name: ClassVar[str]
    """Its name in ``lora.variant``."""
    layer: ClassVar[type[nn.Module]]
    """What is put on a quantized linear: made by PEFT with ``(base_layer, adapter_name, config=..., r=..., ...)``."""

    @abstractmethod
    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors of a target: name in PEFT's file, after the target's own, -> shape.

        Plan, optimizer sizes and checkpoints read this; the first dimension is what ranks share.
        """

    @abstractmethod
    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None) -> LoraConfig:
        """Return PEFT's config of these adapters: what is attached and what adapter_config.json says."""

    @abstractmethod
    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this method."""

    @abstractmethod
    def initial(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Return the start of a trained tensor, float32 of ``shape``; None: zeros.

        Raises:
            NumericsError: if the method has no such tensor.
        """


def parameters_of(method: Method, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return name in PEFT's file -> shape of a target's trained tensors."""
    return {f"base_model.model.{linear.name}.{name}": shape for name, shape in method.shapes(linear, lora).items()}


_METHODS: dict[str, type[Method]] = {}


def register(kind: type[Method]) -> type[Method]:
    """Make a method known by its name: ``lora.variant=NAME`` then takes it (on the command line: those that ship)."""
    _METHODS[kind.name] = kind
    choices.METHODS.add(kind.name)
    return kind


def build_method(name: str) -> Method:
    """Return the method called ``name``."""
    return _METHODS[name]()


def tensor_names() -> set[str]:
    """Return the names of the tensors of all methods, after their targets' own."""
    any_linear, any_settings = LinearShape("any", 1, 1), LoraSettings()
    return {name for kind in _METHODS.values() for name in kind().shapes(any_linear, any_settings)}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """Return the method that an adapter_config.json is of, or None."""
    return next((kind() for kind in _METHODS.values() if kind().recognizes(config)), None)
