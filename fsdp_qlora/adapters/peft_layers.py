"""PEFT's own adapter layers on a meta model: what upstream's constructors would have made on a real one.

PEFT is attached while the linears are still dense `nn.Linear`s on meta; the quantized linears are then put *under* its
layers (`quant/swap.py`). Attaching on meta loses the values of an adapter's buffers, so they are taken from layers that
PEFT attaches to lone linears on the CPU; the initial values of trained tensors come from there, too
(`PeftMethod.initialize`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import skip_init

from fsdp_qlora.adapters.names import ADAPTER
from fsdp_qlora.errors import ModelError

META, CPU = torch.device("meta"), torch.device("cpu")


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Return PEFT's adapter layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and name}


def has_adapter(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether one of a layer's adapters has this name."""
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def layers_alone(
    config: PeftConfig, linears: Mapping[str, tuple[int, int]], device: torch.device,
    dtype: torch.dtype = torch.float32, adapter: str = ADAPTER,
) -> dict[str, Any]:  # fmt: skip
    """Return PEFT's layers by the names of the empty linears, ``name -> (out_features, in_features)``."""
    model = adapted_alone(config, linears, device, dtype, adapter)
    return {name.removeprefix("base_model.model."): layer for name, layer in adapted_layers(model).items()}


def adapted_alone(
    config: PeftConfig, linears: Mapping[str, tuple[int, int]], device: torch.device,
    dtype: torch.dtype = torch.float32, adapter: str = ADAPTER, tables: Collection[str] = (),
) -> PeftModel:  # fmt: skip
    """Return a model of such linears alone, with PEFT's adapters; those among them in ``tables`` are embeddings.

    The memory of the linears is never touched, so they take none.
    """
    root = nn.Module()
    for name, (out_features, in_features) in linears.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if name in tables:
            made = skip_init(nn.Embedding, out_features, in_features, device=device, dtype=dtype)
        else:
            made = skip_init(nn.Linear, in_features, out_features, bias=False, device=device, dtype=dtype)
        parent.add_module(last, made)
    return get_peft_model(root, config, adapter, low_cpu_mem_usage=device == META)  # type: ignore[arg-type, return-value]


def restore_buffers(model: PeftModel, config: PeftConfig, adapter: str = ADAPTER) -> None:
    """Give the buffers of an adapter that was attached on meta the values that PEFT gives them.

    Shared projections depend on the sizes of all linears, so one linear of each size is adapted again.
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if has_adapter(layer, adapter)}
    lost = {name: layer for name, layer in layers.items() if any(b.is_meta for _, _, b in _buffers(layer))}
    if not lost:
        return
    first = {_size(layer): name for name, layer in reversed(layers.items())}
    dtype = next(iter(layers.values())).get_base_layer().weight.dtype
    config = copy.deepcopy(config)
    config.task_type = config.base_model_name_or_path = None  # lone linears are no language model
    config.target_modules = set(first.values())  # type: ignore[attr-defined]
    made = layers_alone(config, {name: size for size, name in first.items()}, CPU, dtype)  # type: ignore[arg-type]
    for layer in lost.values():
        real = made[first[_size(layer)]]
        for path, name, lost_one in _buffers(layer):
            if not lost_one.is_meta:  # shared, and restored with the first layer
                continue
            buffer = real.get_submodule(path).get_buffer(name)
            if buffer.is_floating_point():  # PEFT rounds to the base's dtype, then computes in the trained tensors'
                buffer = buffer.to(dtype)
            setattr(layer.get_submodule(path), name, buffer)  # type: ignore[attr-defined]


def _size(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _buffers(layer: Any) -> list[tuple[str, str, torch.Tensor]]:
    """Return ``(module, name, buffer)`` for the buffers of an adapter, without those of its base layer."""
    return [
        (path, name, buffer)
        for path, module in layer.named_modules()
        if path.partition(".")[0] != "base_layer"
        for name, buffer in module.named_buffers(recurse=False)
    ]


class _Unmergeable:
    """Mixin for PEFT's layers, in front of their class."""

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: PEFT would add to a dequantized copy and lose the result without an error."""
        raise ModelError(
            "merge: adapters cannot be merged into a sharded or quantized base; export the adapter, and merge it into "
            "the original model with PEFT."
        )


def refuse_merging(model: nn.Module) -> None:
    """Let ``merge`` of PEFT's layers raise an error.

    The layers become instances of a subclass, as `fully_shard` does it; no class is changed.
    """
    for layer in adapted_layers(model).values():
        if isinstance(layer, _Unmergeable):
            continue
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (_Unmergeable, kind), {"__module__": kind.__module__})
