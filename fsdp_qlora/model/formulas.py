"""The few formulas that nearly all of upstream's RMSNorms and gated MLPs compute, and which module computes which.

A module is recognised by the code of its class's own ``forward``, which upstream repeats in each model's file: the same
bytecode, reading the same globals, is the same formula. A subclass with another ``forward`` is not recognised, nor is a
module with buffers or other parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Formula = Callable[..., Tensor]
"""A norm's takes rows ``[tokens, width]``, the weight ``[width]`` and epsilon; a product's takes gate and up, each
``[tokens, width]``. It returns ``[tokens, width]`` in the dtype of the first argument."""


def scaled_after_cast(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return Llama's RMSNorm: ``weight * normalised``, the latter rounded to the dtype of the rows first."""
    values = rows.to(torch.float32)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return weight * values.to(rows.dtype)


def scaled_before_cast(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return OLMo 2's RMSNorm: ``weight * normalised``, rounded afterwards."""
    values = rows.to(torch.float32)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * values).to(rows.dtype)


def one_plus_weight(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return Gemma's RMSNorm: ``(1 + weight) * normalised``, rounded afterwards."""
    values = rows.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (values * (1.0 + weight.float())).type_as(rows)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return the product in SwiGLU (https://arxiv.org/abs/2002.05202)."""
    return F.silu(gate) * up


def gelu_tanh_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return the product in GeGLU, with tanh's approximation of GELU."""
    return F.gelu(gate, approximate="tanh") * up


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return the product in GeGLU."""
    return F.gelu(gate) * up


def norm_formula(module: nn.Module) -> tuple[Formula, float] | None:
    """Return the formula and epsilon of an RMSNorm; None if it is no such norm."""
    if not _holds_only(module, parameters={"weight"}, children=set()):
        return None
    for upstream, formula, eps in _norms():
        same = [_same_code(getattr(type(module), name, None), getattr(upstream, name)) for name in _methods(upstream)]
        if all(same) and isinstance(value := getattr(module, eps, None), float):
            return formula, value
    return None


def product_formula(module: nn.Module) -> Formula | None:
    """Return the formula of the product in a gated MLP; None if it is no such MLP, or its activation is another."""
    children = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    if not _holds_only(module, parameters=set(), children=children):
        return None
    if not any(_same_code(type(module).forward, upstream.forward) for upstream in _mlps()):
        return None
    return _activation_formula(module.get_submodule("act_fn"))


def _activation_formula(activation: nn.Module) -> Formula | None:
    from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

    code = getattr(activation, "act", None)  # GELUs choose one when they are made
    if type(activation) in (nn.SiLU, SiLUActivation):
        return silu_product
    if type(activation) is GELUTanh and isinstance(code, partial):
        return gelu_tanh_product
    if type(activation) is GELUActivation and code is F.gelu:
        return gelu_product
    return None


def _holds_only(module: nn.Module, parameters: set[str], children: set[str]) -> bool:
    """Whether a module has exactly these parameters and children, and no buffers."""
    return (
        {name for name, _ in module.named_parameters(recurse=False)} == parameters
        and {name for name, _ in module.named_children()} == children
        and not any(True for _ in module.buffers(recurse=False))
    )


@cache
def _norms() -> tuple[tuple[type[nn.Module], Formula, str], ...]:
    """Return upstream's classes, their formulas, and the name of epsilon."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    return (
        (LlamaRMSNorm, scaled_after_cast, "variance_epsilon"),
        (Olmo2RMSNorm, scaled_before_cast, "variance_epsilon"),
        (GemmaRMSNorm, one_plus_weight, "eps"),
    )


@cache
def _mlps() -> tuple[type[nn.Module], ...]:
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    return (LlamaMLP, Qwen2MLP)  # two spellings of one formula


def _methods(kind: type[nn.Module]) -> list[str]:
    """Return the methods whose code makes up the formula: ``forward``, and Gemma's ``_norm``."""
    return [name for name in ("forward", "_norm") if name in vars(kind)]


def _same_code(mine: Any, upstream: Any) -> bool:
    """Whether two functions compute the same: equal bytecode and constants, and the same globals behind the names."""
    if not isinstance(mine, FunctionType) or mine.__closure__ or mine.__defaults__ or mine.__kwdefaults__:
        return False
    a, b = mine.__code__, upstream.__code__
    if (a.co_code, a.co_consts, a.co_names, len(a.co_varnames), a.co_argcount, a.co_flags) != (
        b.co_code, b.co_consts, b.co_names, len(b.co_varnames), b.co_argcount, b.co_flags,
    ):  # fmt: skip
        return False
    missing = object()
    return all(mine.__globals__.get(n, missing) is upstream.__globals__.get(n, missing) for n in a.co_names)
