"""Buffers: which ones are stored in files, and how they survive ``to_empty``."""

from __future__ import annotations

import re

import torch
from torch import nn

from fsdp_qlora.quant.matrices import QuantMatrices


def in_no_file(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that ``state_dict`` leaves out; torch has no public API for this."""
    return module._non_persistent_buffers_set


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are part of ``state_dict``, and so may be in the files, by name."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": buffer
        for prefix, module in model.named_modules()
        if not isinstance(module, QuantMatrices)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in in_no_file(module)
    }


def to_empty_but_buffers(model: nn.Module, shards_on: torch.device, device: torch.device) -> None:
    """Allocate the meta parameters of ``model`` on ``shards_on``; move its buffers, with their values, to ``device``.

    Only meta buffers (those of our own layers, filled together with the weights) are left uninitialized.
    """
    buffers = [(m, n, b) for m in model.modules() for n, b in list(m.named_buffers(recurse=False))]
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=shards_on)
    for (first, name), *others in places.values():  # `to_empty` makes a tensor for each place of a tied weight
        for module, other in others:
            setattr(module, other, getattr(first, name))
    for module, name, buffer in buffers:
        made = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        setattr(module, name, made)


def matches_any(name: str, patterns: set[str] | list[str] | None) -> bool:
    """Whether any of upstream's regular expressions matches somewhere in ``name``."""
    return any(re.search(pattern, name) for pattern in patterns or ())
