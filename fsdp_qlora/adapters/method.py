"""`Method`: a kind of adapter trained on a frozen base.

A method defines an adapter's tensors, their initial values and its PEFT config; `Method.layer` computes. It is
stateless and knows nothing of FSDP: shapes are unsharded, and each tensor is drawn whole and then sliced.
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
    """Wraps a quantized linear; PEFT constructs it with ``(base_layer, adapter_name, config=..., r=..., ...)``."""

    @abstractmethod
    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors of a target: name in PEFT's file, after the target's name -> shape.

        The plan, optimizer sizes and checkpoints use it; tensors are sharded along the first dimension.
        """

    @abstractmethod
    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None) -> LoraConfig:
        """Return the PEFT config: it determines the attached layers and adapter_config.json."""

    @abstractmethod
    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json belongs to this method."""

    @abstractmethod
    def initial(self, name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Return the initial value of a trained tensor, float32 of ``shape``; None for zeros.

        Raises:
            NumericsError: if the method has no such tensor.
        """


def parameters_of(method: Method, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return name in PEFT's file -> shape, for a target's trained tensors."""
    return {f"base_model.model.{linear.name}.{name}": shape for name, shape in method.shapes(linear, lora).items()}


_METHODS: choices.Registry[Method] = choices.Registry("adapter method", choices.METHODS)
register = _METHODS.register


def build_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    return _METHODS[name]()


def tensor_names() -> set[str]:
    """Return the tensor names of all methods, without their targets' names."""
    any_linear, any_settings = LinearShape("any", 1, 1), LoraSettings()
    return {name for kind in _METHODS.values() for name in kind().shapes(any_linear, any_settings)}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """Return the method that an adapter_config.json belongs to, or None."""
    return next((kind() for kind in _METHODS.values() if kind().recognizes(config)), None)
