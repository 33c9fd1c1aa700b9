"""Linears that plain PEFT cannot name in a model whose experts transformers stacks.

For such families PEFT (0.21, with transformers 5) takes target modules called ``gate_proj``, ``up_proj``, ``down_proj``
(Mixtral's: ``w1``, ``w2``, ``w3``) for the experts' stacked parameters, wherever they are: an adapter on the MLP of a
dense layer or of shared experts would be loaded as an adapter on all experts. PEFT's table is private; this is the one
place that reads it, and `tests/unit/test_lora.py` says when it changes.
"""

from __future__ import annotations

from typing import Any

from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping


def names_taken_for_experts(model_config: Any) -> frozenset[str]:
    """Return the last parts of names that PEFT takes for stacked experts in a model with this config."""
    model_type = getattr(model_config, "model_type", None)
    if model_type is None or get_checkpoint_conversion_mapping(model_type) is None:
        return frozenset()
    pattern = str(_MODEL_TO_CONVERSION_PATTERN.get(model_type))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(pattern, {}))
