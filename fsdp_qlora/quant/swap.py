"""Replace the planned linears of a meta model by `QuantLinear`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.formats import QuantFormat
from fsdp_qlora.quant.linear import QuantLinear


def swap_linears(model: nn.Module, names: Iterable[str], quant_format: QuantFormat) -> list[str]:
    """Put a `QuantLinear` on meta in the place of each named ``nn.Linear``; return the names swapped.

    Raises:
        PlanError: if a name is no linear layer of ``model``, or is not on the meta device (its weight would be lost).
    """
    swapped: list[str] = []
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise PlanError(f"{name} is a {type(linear).__name__}, not a linear layer: it cannot be quantized.")
        if linear.weight.device != torch.device("meta"):
            raise PlanError(f"{name} holds a weight already; swap_linears works on a meta model before loading.")
        parent, _, child = name.rpartition(".")
        replacement = QuantLinear(
            linear.in_features, linear.out_features, quant_format, linear.bias is not None, linear.weight.dtype
        )
        setattr(model.get_submodule(parent), child, replacement)
        swapped.append(name)
    return swapped
