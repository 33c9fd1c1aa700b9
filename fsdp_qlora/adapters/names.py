"""Linears whose adapter plain PEFT would not load where it belongs.

For families whose experts transformers stacks PEFT (0.21, with transformers 5) takes target modules called
``gate_proj``, ``up_proj``, ``down_proj`` (Mixtral's: ``w1``, ``w2``, ``w3``) for the experts' stacked parameters,
wherever they are: an adapter on the MLP of a dense layer or of shared experts would be loaded as an adapter on all
experts. And it sends an adapter's names through the renamings that transformers has for a family's old checkpoints;
where one of them meets a name that is a new one already (Laguna's ``shared_experts``), the adapter is left out with a
warning. PEFT's table is private; this is the one place that reads it, and `tests/unit/test_upstream_code.py` says when
it changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    _MOE_TARGET_MODULE_MAPPING,
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping


def names_taken_for_experts(model_config: Any) -> frozenset[str]:
    """Return the last parts of names that PEFT takes for stacked experts in a model with this config."""
    model_type = getattr(model_config, "model_type", None)
    if model_type is None or get_checkpoint_conversion_mapping(model_type) is None:
        return frozenset()
    pattern = str(_MODEL_TO_CONVERSION_PATTERN.get(model_type))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def renamed_by_peft(model: PreTrainedModel, names: Iterable[str]) -> frozenset[str]:
    """Return those of the linears ``names`` of a (meta) model whose adapters PEFT would look for under other names."""
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    tensors = {key: torch.empty(1, 1, device="meta") for key in keys}
    kept = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors, "default")
    found = {key.replace(".lora_A.default.", ".lora_A.") for key in kept}
    return frozenset(name for key, name in keys.items() if key not in found)


ADAPTER = "default"
"""Name of the one adapter that is trained, as PEFT calls it."""


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` of what is trained; the names are those of a plain PEFT adapter file."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield adapter_key(name), parameter


def adapter_of(name: str) -> str:
    """Return what the tensors of one adapter have in common in their names: ``...q_proj.lora_*.weight``."""
    return re.sub(r"\.lora_[^.]+", ".lora_*", name)


def adapter_key(name: str) -> str:
    """Return a parameter's name in PEFT's file: from ``base_model`` on, without the adapter's name."""
    return re.sub(rf"\.{ADAPTER}(?=\.|$)", "", name[name.index("base_model") :])
