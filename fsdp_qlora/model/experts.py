"""Registers the 4-bit experts forward in transformers' experts interface and switches a model's experts to it."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fsdp_qlora.quant.experts import EXPERTS_IMPLEMENTATION, experts_forward

ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def use_quantized_experts(model: PreTrainedModel) -> None:
    """Make the experts of ``model``, whose weights are already `QuantMatrices`, run `experts_forward`."""
    model.config._experts_implementation = EXPERTS_IMPLEMENTATION
