"""Rotary tables that upstream selects per batch are selected once, for the longest row of the run.

With ``longrope``, upstream uses the long factors as soon as one row in the batch is longer than the trained length;
with ``dynamic`` NTK scaling, it stretches the frequencies to the longest row seen so far. What the model learns from a
row would then depend on its neighbours, on the micro-batch and on the number of ranks. Here a run has one table: the
one upstream uses for a batch whose longest row has ``data.max_length`` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fsdp_qlora.errors import ModelError

_SETTLED = "default"
"""The rope type for which upstream never changes a module's frequencies."""


def rope_choice(model_config: Any, max_length: int) -> str | None:
    """Describe what `settle_rope` chooses for a model with this config; None if there is no choice."""
    rope = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
    kinds = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    told = [_in_words(part, max_length) for part in kinds if part.get("rope_type") == "longrope"]
    return told[0] if told else None


def _in_words(rope: dict[str, Any], max_length: int) -> str:
    original = int(rope["original_max_position_embeddings"])
    factors = "long" if max_length > original else "short"
    return f"{factors} factors for all rows (data.max_length {max_length}, trained length {original})"


def settle_rope(model: PreTrainedModel, max_length: int) -> None:
    """Fix the rotary frequencies of ``model`` in place, once for all batches.

    Raises:
        ModelError: with ``dynamic`` scaling, if rows may exceed the model's original length.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            _settle(module, kinds, None, max_length)
        elif isinstance(kinds, dict):
            for layer_type, kind in list(kinds.items()):
                _settle(module, kind, layer_type, max_length)


def _settle(module: nn.Module, kind: str, layer_type: str | None, max_length: int) -> None:
    if kind not in ("longrope", "dynamic"):
        return
    config: Any = module.config
    prefix = "" if layer_type is None else f"{layer_type}_"
    if kind == "dynamic":
        limit = int(getattr(module, "original_max_seq_len", config.max_position_embeddings))
        if max_length > limit:
            raise ModelError(
                f"data.max_length: {max_length} is longer than the {limit} positions of this model, whose rotary "
                "embedding (rope_type=dynamic) would then change with the longest row of each batch. Set "
                f"data.max_length={limit} or less, or another rope_type in model.config_overrides."
            )
    else:
        more = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_length, **more)
        for name in (f"{prefix}inv_freq", f"{prefix}original_inv_freq"):
            getattr(module, name).copy_(frequencies)
    if layer_type is None:
        module.rope_type = _SETTLED  # type: ignore[assignment]
    else:
        module.rope_type[layer_type] = _SETTLED  # type: ignore[index]
