"""Registers our experts forward in transformers' experts interface and switches a model's experts to it."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fsdp_qlora.quant.experts import EXPERTS_IMPLEMENTATION, experts_forward

ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def use_experts_forward(model: PreTrainedModel) -> None:
    """Make the experts of ``model`` run `experts_forward`: their weights are quantized or get adapters."""
    model.config._experts_implementation = EXPERTS_IMPLEMENTATION
