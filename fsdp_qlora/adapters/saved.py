"""What PEFT's layers keep from forward to backward: found by running one forward of a layer on meta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fsdp_qlora.adapters.peft_layers import META
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.shapes.linears import LinearShape

_TOKENS = 64
"""Any number will do: what is kept grows by the same for each token."""


@dataclass(frozen=True)
class Kept:
    """Numbers that an adapter keeps from forward to backward besides the linear's input and output."""

    fixed: int = 0
    a_token: int = 0
    input: bool = True
    """Whether it keeps the linear's input as well."""
    tensors: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    """``(fixed, a_token)`` of each tensor; empty: there is one."""

    @property
    def each(self) -> tuple[tuple[int, int], ...]:
        """``(fixed, a_token)`` of each tensor."""
        return self.tensors or ((self.fixed, self.a_token),)


_KNOWN: dict[tuple[str, str, int, int, str], Kept] = {}
"""By method, last part of the target's name, its size and the settings: a model has few, and many linears."""


def kept_by(method: str, linear: LinearShape, lora: LoraSettings, build: Callable[[], Any]) -> Kept:
    """Return what the layer of PEFT's that ``build`` makes for such a linear keeps; it is run once for each kind."""
    key = (method, linear.name.rpartition(".")[2], linear.out_features, linear.in_features, repr(lora))
    if key not in _KNOWN:
        _KNOWN[key] = kept_by_layer(build())
    return _KNOWN[key]


def kept_by_layer(layer: Any) -> Kept:
    """Return what an adapter layer of PEFT's, alone on meta, keeps in bf16, as FSDP casts its parameters.

    Tensors are told apart by their storages, so views count once. The layer's own parameters and buffers, its input and
    its output are left out.
    """
    _in_bf16(layer)
    (few, reads_input), (many, _) = (_kept(layer, tokens) for tokens in (_TOKENS, 2 * _TOKENS))
    tensors = []
    for small, large in zip(few, many, strict=True):
        a_token = round((large - small) / _TOKENS)
        tensors.append((small - a_token * _TOKENS, a_token))
    fixed, a_token = (sum(tensor[place] for tensor in tensors) for place in range(2))
    return Kept(fixed, a_token, reads_input, tuple(tensors))


def _in_bf16(layer: nn.Module) -> None:
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.bfloat16)
        for name, buffer in list(module.named_buffers(recurse=False)):
            dtype = torch.bfloat16 if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, buffer.to(META, dtype))


def _kept(layer: nn.Module, tokens: int) -> tuple[list[int], bool]:
    """Return the numbers that each tensor holds, in the order in which they are saved, and whether the input is."""
    x = torch.empty(1, tokens, int(layer.in_features), dtype=torch.bfloat16, device=META, requires_grad=True)  # type: ignore[arg-type]
    known = [tensor.untyped_storage() for tensor in (x, *layer.parameters(), *layer.buffers())]
    saved: list[torch.UntypedStorage] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    layer.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        known.append(layer(x).untyped_storage())
    # a storage is one object for as long as it is held; on meta it has no address
    seen = {id(storage) for storage in known}
    own = {id(storage): storage for storage in saved if id(storage) not in seen}
    input_saved = any(storage is known[0] for storage in saved)
    return [storage.nbytes() // torch.bfloat16.itemsize for storage in own.values()], input_saved
