"""Finds linears whose adapter plain PEFT would load in the wrong place, and names adapter tensors as PEFT does.

In families whose experts transformers stacks, PEFT (0.21, with transformers 5) takes any target module called
``gate_proj``, ``up_proj`` or ``down_proj`` (Mixtral: ``w1``, ``w2``, ``w3``) for the experts' stacked parameters. An
adapter on the MLP of a dense layer or of shared experts would be loaded as an adapter on all experts. PEFT also applies
transformers' renamings of a family's old checkpoints to an adapter's names. If a renaming matches a name that is
already a new one (Laguna's ``shared_experts``), the adapter is left out with a warning. PEFT's table is private; only
this module reads it, and `tests/unit/test_upstream_code.py` fails when it changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.transformers_weight_conversion import (
    _MOE_TARGET_MODULE_MAPPING,
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping


def names_taken_for_experts(model_config: Any) -> frozenset[str]:
    """Return the last name parts that PEFT takes for stacked experts in a model with this config."""
    model_type = getattr(model_config, "model_type", None)
    if model_type is None or get_checkpoint_conversion_mapping(model_type) is None:
        return frozenset()
    pattern = str(_MODEL_TO_CONVERSION_PATTERN.get(model_type))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def renamed_by_peft(model: PreTrainedModel, names: Iterable[str]) -> frozenset[str]:
    """Return those linears in ``names`` whose adapters PEFT would look up under other names.

    ``model`` may be on meta.
    """
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    tensors = {key: torch.empty(1, 1, device="meta") for key in keys}
    kept = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors, "default")
    stored = {key.replace(".lora_A.default.", ".lora_A.") for key in kept}
    return frozenset(name for key, name in keys.items() if key not in stored)


IN_FILE = "base_model.model."
"""What PEFT's files put before the name of a module."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""Endings of the names of a LoRA's tensors in PEFT's files: ``[r, in_features]`` and ``[out_features, r]``."""
ADAPTER = "default"
"""PEFT's name of the one adapter that is trained."""


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` for trained parameters, with the names of a plain PEFT adapter file."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield adapter_key(name), parameter


_PREFIXES = "|".join(sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values())))


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` for the parameters of one of a model's adapters, with the names of its own file."""
    own = re.compile(rf"\.(?:{_PREFIXES})[^.]*\.{re.escape(adapter)}(?=\.|$)")
    for name, parameter in model.named_parameters():
        if own.search(name):
            yield adapter_key(name, adapter), parameter


def adapter_of(name: str) -> str:
    """Return the common name of all tensors of one adapter: ``...q_proj.lora_*.weight``."""
    return re.sub(rf"\.({_PREFIXES})[^.]+", r".\1*", name)


def adapter_key(name: str, adapter: str = ADAPTER) -> str:
    """Return a parameter's name in PEFT's file: from ``base_model`` on, without the adapter's name.

    In a model without adapters, return its name in the base's files.
    """
    if "base_model" not in name:
        return name.removeprefix("model.")
    key = re.sub(rf"\.{re.escape(adapter)}(?=\.|$)", "", name[name.index("base_model") :])
    return key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")  # as PEFT's old files have it
