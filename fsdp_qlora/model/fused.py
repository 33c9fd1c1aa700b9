"""Replaces modules of a meta model by modules with the same parameters and names that call other code.

Names in state dicts, shapes and the parameters themselves stay the same, so everything that comes after (quantized
linears, adapters, sharding, loading, export) works as with upstream's modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsdp_qlora.model.formulas import Formula, norm_formula, product_formula
from fsdp_qlora.model.kernels import Kernels


class FusedNorm(nn.Module):
    """An RMSNorm of upstream's, computed by other code."""

    def __init__(self, norm: nn.Module, eps: float, code: Formula) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self.eps = eps
        self._code = code
        self.train(norm.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``hidden_states [..., width]``, normalised."""
        width = hidden_states.shape[-1]  # rows of tokens: one compilation, however many dimensions there are
        return self._code(hidden_states.reshape(-1, width), self.weight, self.eps).view(hidden_states.shape)

    def extra_repr(self) -> str:
        """Show shape and epsilon, as upstream does."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class FusedMLP(nn.Module):
    """A gated MLP of upstream's whose product is computed by other code."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, mlp: nn.Module, code: Formula) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            setattr(self, name, mlp.get_submodule(name))
        self._code = code
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, ``[..., hidden]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = self._code(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]))
        return self.down_proj(product.view(gate.shape))


@dataclass(frozen=True)
class Fused:
    """The modules of a model that other code can compute."""

    modules: dict[str, nn.Module]
    """Name in the model -> the module that replaces it."""
    left: Counter[str]
    """Classes of norms and gated modules that stay upstream's -> how many."""

    def describe(self, loss: bool | None = None) -> str:
        """Return what is replaced and what is not, in a few words; ``loss`` is whether the loss is computed, too."""
        counts = Counter("norm" if isinstance(module, FusedNorm) else "MLP" for module in self.modules.values())
        done = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items()] or ["no module"]
        left = [f"{count} {name}" for name, count in self.left.items()]
        if loss is not None:
            (done if loss else left).append("the loss")
        return ", ".join(done) + (f"; left as they are: {', '.join(left)}" if left else "")


def fusible(model: nn.Module, kernels: Kernels, dtype: torch.dtype, inside_not: Iterable[nn.Module] = ()) -> Fused:
    """Return the modules of a meta model that ``kernels`` can compute, except those within ``inside_not``.

    ``dtype`` is that of the activations: a norm with a weight in another one promotes them, or stays in float32.
    """
    excluded = {module for outer in inside_not for module in outer.modules()}
    modules: dict[str, nn.Module] = {}
    left: Counter[str] = Counter()
    for name, module in model.named_modules():
        if module in excluded:
            continue
        made = _made(module, kernels, dtype)
        if made is not None:
            modules[name] = made
        elif _is_norm(module) or _has_activation(module):
            left[type(module).__name__] += 1
    return Fused(modules, left)


def _made(module: nn.Module, kernels: Kernels, dtype: torch.dtype) -> nn.Module | None:
    norm = norm_formula(module)
    if norm is not None:
        formula, eps = norm
        code = kernels.code(formula)
        return None if code is None or module.get_parameter("weight").dtype != dtype else FusedNorm(module, eps, code)
    formula = product_formula(module)
    code = None if formula is None else kernels.code(formula)
    return None if code is None else FusedMLP(module, code)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _has_activation(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return any(name in children for name in ("act_fn", "activation_fn", "act"))


def swap_fused(model: nn.Module, fused: Fused) -> None:
    """Put the replacements into the model."""
    for name, module in fused.modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
