"""No adapters (``lora=none``): every parameter of the base is trained, as sharded float32 masters.

FSDP casts a unit's shards to the compute dtype where it gathers them, and reduces its gradients in float32. With AdamW
a parameter takes 16 bytes: itself, its gradient and two moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.method import Method, register_none
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes


@register_none
class Full(Method):
    """Full fine-tuning."""

    name = "none"
    layer = nn.Linear
    trains_base = True

    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return no tensors: linears have no adapters."""
        return {}

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> LoraConfig:
        """Raise: there is no adapter to describe."""
        raise PlanError("lora: none has no adapter; its result is a model.")

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Return False: no adapter belongs to it."""
        return False

    def initialize(self, model: nn.Module, lora: LoraSettings, seed: int, shard_rank: int, shard_size: int) -> None:
        """Do nothing: the files of the base hold the initial values."""


def whole_base(shapes: ModelShapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return every parameter of the base as trained: module -> name -> shape.

    Raises:
        PlanError: if upstream keeps some in float32, which FSDP would round in forward.
    """
    if shapes.float32:
        raise PlanError(
            f"lora: none cannot train this model: upstream keeps {min(shapes.float32)} in float32, but its unit "
            "computes in another precision. Set precision=fp32."
        )
    trained: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.parameters.items():
        trained.setdefault(name.rpartition(".")[0], {})[name] = shape
    return trained


def train_base(base: PreTrainedModel) -> PreTrainedModel:
    """Make every parameter of a meta model a trained float32 one."""
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)
    return base
