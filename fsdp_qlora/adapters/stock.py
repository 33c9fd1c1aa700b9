"""Adapters on a model that plain transformers has spread over devices, host memory and disk, with PEFT's own layers.

Neither of the usual ways does this. transformers' ``load_adapter`` leaves uninitialised numbers in the adapters of
layers on disk, and PEFT's ``from_pretrained`` spreads the model anew for the first adapter only
(`tests/distributed/test_spread.py` tries both). Here the layers keep the hooks by which accelerate moves their weights,
and the adapters, which are small, stay on the devices that compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.lora import AdaptedModel
from fsdp_qlora.adapters.names import ADAPTER
from fsdp_qlora.errors import ModelError


def attach_stock(model: PreTrainedModel, folders: Mapping[str, Path], device: torch.device) -> AdaptedModel:
    """Attach adapters to a loaded model, frozen; the first is in use.

    Args:
        model: what transformers loaded.
        folders: their folders by name; an empty name: the only one, which has none.
        device: where layers in host memory or on disk are computed.

    Raises:
        ModelError: if the tensors of an adapter and its layers are not the same.
    """
    adapted: AdaptedModel | None = None
    for name, folder in folders.items():
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        if adapted is None:
            adapted = AdaptedModel(model, config, name or ADAPTER)
        else:
            adapted.add_adapter(name or ADAPTER, config)
        _make_room(adapted, name or ADAPTER, device)
        _fill(adapted, name or ADAPTER, folder)
    assert adapted is not None
    return adapted.requires_grad_(False).eval()


def _fill(adapted: AdaptedModel, name: str, folder: Path) -> None:
    weights = load_peft_weights(str(folder), device="cpu")
    filled = set_peft_model_state_dict(adapted, weights, adapter_name=name)
    missing = [key for key in filled.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if odd := [*missing, *filled.unexpected_keys]:
        raise ModelError(
            f"adapter: {folder} and the layers that its config means do not have the same tensors: {len(odd)} are only "
            f"in one of them (first: {odd[0]})."
        )


def _make_room(adapted: AdaptedModel, name: str, device: torch.device) -> None:
    """Put what PEFT has made on meta, beside weights that come only when they are needed, on ``device``, unfilled."""
    for layer in adapted.modules():
        parts = layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ()
        for held in (getattr(layer, part, None) for part in parts):
            if isinstance(held, nn.ModuleDict) and name in held:
                if any(parameter.is_meta for parameter in held[name].parameters()):
                    held[name].to_empty(device=device)
            elif isinstance(held, nn.ParameterDict) and name in held and held[name].is_meta:
                held[name] = nn.Parameter(torch.empty_like(held[name], device=device), requires_grad=False)
