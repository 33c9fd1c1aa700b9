"""Which linears of a model may be replaced by quantized ones: those that only compute a product and a bias.

A subclass with its own ``forward`` would silently lose it; a module that reads the ``.weight`` of a linear it owns (the
time-step projections in Mamba-like models, DeepSeek-V3.2's indexer, much remote code) would find packed bytes or
nothing. Such linears stay as they are: unquantized and without an adapter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fsdp_qlora.model.construct import left_dense
from fsdp_qlora.shapes.linears import LinearShape

_READS = re.compile(r"\.(\w+)\.(?:weight|bias)\b")
_METHODS = "_init_weights|reset_parameters|init_weights|fuse_projections|get_dtype|get_device"
_NOT_IN_FORWARD = re.compile(rf"^( *)def (?:{_METHODS})\b.*?(?=^\1(?:def |@)|\Z)", re.M | re.S)
"""Methods that no forward calls: upstream's initialisation, what makes one linear of several in diffusers, and what
says the dtype of Qwen2-VL's tower."""

_NOT_MODELS = (
    "torch.", "builtins", "transformers.modeling_utils", "diffusers.models.modeling_utils", "fsdp_qlora.", "peft.",
)  # fmt: skip
"""Modules whose classes compute no model; upstream's base classes name the weights of old checkpoints."""


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether ``module`` is a linear layer with upstream's own forward."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


def replaceable_linears(model: nn.Module) -> Iterator[LinearShape]:
    """Yield the weights of ``model`` that can be stored quantized, in module order; they may include the head."""
    read = set(_read_by_others(model))
    for name, module in model.named_modules():
        if name in read:
            continue
        yield from _shapes(name, module)


def kept_linears(model: nn.Module, inside: tuple[str, ...]) -> dict[str, str]:
    """Return the linears within the modules ``inside`` that are not replaced: name -> reason."""
    read, dense = _read_by_others(model), left_dense(model)
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or not name.startswith(tuple(f"{x}." for x in inside)):
            continue
        if not is_plain_linear(module):
            kept[name] = f"a {type(module).__name__} has its own forward"
        elif _in_float32(module, model):
            kept[name] = "upstream keeps it in float32"
        elif name in read and f"{name}.weight" in dense:
            kept[name] = "upstream's own quantization leaves it dense"
        elif name in read:
            kept[name] = f"{read[name]} reads its weight"
    return kept


def _shapes(name: str, module: nn.Module) -> Iterator[LinearShape]:
    """Yield a linear's weight, or the stacked weights of a module of experts."""
    if isinstance(module, nn.Linear) and is_plain_linear(module):
        yield LinearShape(name, module.out_features, module.in_features, module.bias is not None)
    elif isinstance(module, Conv1D) and is_plain_linear(module):
        yield LinearShape(name, module.nf, module.nx, True, transposed=True)
    elif _takes_experts_forward(module):
        for key in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            weight = getattr(module, key, None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 3:
                turned = bool(module.is_transposed)
                count, rows, columns = weight.transpose(1, 2).shape if turned else weight.shape
                yield LinearShape(f"{name}.{key}", rows, columns, count=count, transposed=turned, stacked=True)


def _takes_experts_forward(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs this module."""
    return getattr(module, "has_gate", None) is not None and hasattr(type(module).forward, "__wrapped__")


def _in_float32(module: nn.Linear | Conv1D, model: nn.Module) -> bool:
    return _dtype_of(model).itemsize < module.weight.dtype.itemsize


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter of floating-point numbers, which upstream calls the model's."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _read_by_others(model: nn.Module) -> dict[str, str]:
    """Return the linears whose weight or bias an enclosing module's code reads: name -> that module's class."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    readers: dict[str, str] = {
        name: "upstream"
        for name in linears
        if _in_float32(model.get_submodule(name), model)  # type: ignore[arg-type]
    }
    for owner, module in model.named_modules():
        children = _children_read(type(module)) if owner else frozenset()
        if isinstance(module, nn.MultiheadAttention):  # torch's own: in the pooling head of a SigLIP
            children |= {"out_proj"}
        for name in linears if children else ():
            if name.startswith(f"{owner}.") and name.rpartition(".")[2] in children:
                readers.setdefault(name, type(module).__name__)
    return readers


@cache
def _children_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the submodules whose ``.weight`` or ``.bias`` a class's methods read."""
    names: set[str] = set()
    for each in kind.__mro__:
        if each.__module__.startswith(_NOT_MODELS):
            continue
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):  # created at run time: no source to read
            continue
        names.update(_READS.findall(_NOT_IN_FORWARD.sub("", source)))
    return frozenset(names)
