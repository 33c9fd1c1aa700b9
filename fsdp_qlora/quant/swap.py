"""Replaces the linears of a meta model that will be quantized by modules that hold packed parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.formats import Format, Packed, build_format
from fsdp_qlora.quant.linear import QuantLinear, ReadableLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.shapes.linears import LinearShape


def swap_linears(
    model: nn.Module, linears: Iterable[LinearShape | Packed], quant_format: Format | None = None,
    cache_dequantized: bool = False,
) -> list[str]:  # fmt: skip
    """Replace each linear by a `QuantLinear` on meta, and stacked matrices by `QuantMatrices`.

    Under an adapter layer, its ``base_layer`` is replaced, by a `ReadableLinear`.

    Each uses ``quant_format`` or, if that is None, the format of its `Packed`. With ``cache_dequantized``, dense
    matrices are kept from forward to backward (or for good, `keep_dense`). Returns the names swapped.

    Raises:
        PlanError: if one is not a linear layer of ``model``, or is not on the meta device (its weight would be lost).
    """
    default = quant_format or build_format()
    packed = [x if isinstance(x, Packed) else Packed(x, default) for x in linears]
    return [_swap(model, x.linear, quant_format or x.quant_format, cache_dequantized) for x in packed]


def keep_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Dequantize what ``model`` caches to ``dtype`` and keep it for good; call it once the weights are loaded."""
    for module in model.modules():
        if isinstance(module, QuantMatrices):
            module.keep_dense(dtype)


def _swap(model: nn.Module, linear: LinearShape, quant_format: Format, cache_dequantized: bool) -> str:
    parent_name, _, child = linear.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    target = getattr(parent, child)
    kind = QuantLinear
    if isinstance(inner := getattr(target, "base_layer", None), nn.Module):
        parent, child, target, kind = target, "base_layer", inner, ReadableLinear
    weight = target if isinstance(target, nn.Parameter) else getattr(target, "weight", None)
    if not isinstance(weight, nn.Parameter) or tuple(weight.shape) != linear.stored_shape:
        raise PlanError(f"{linear.name} is a {type(target).__name__}, not a linear layer: it cannot be quantized.")
    if weight.device != torch.device("meta"):
        raise PlanError(f"{linear.name} already holds a weight; swap_linears works on a meta model before loading.")
    if isinstance(target, nn.Parameter):
        delattr(parent, child)
        made = QuantMatrices(linear.in_features, linear.out_features, quant_format, linear.count)
    else:
        bias = getattr(target, "bias", None) is not None
        made = kind(linear.in_features, linear.out_features, quant_format, bias, weight.dtype)
    made.stored, made.cache_dequantized = linear, cache_dequantized
    setattr(parent, child, made)
    return linear.name
