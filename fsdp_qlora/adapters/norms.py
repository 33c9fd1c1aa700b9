"""DoRA's norms, computed once per optimizer step: for its first forward, and shared by all others and recomputation.

PEFT dequantizes the weight and multiplies the adapter out in every forward. But the norms change only with A and B, and
are constants in backward (https://arxiv.org/abs/2402.09353, section 4.3). Here a layer keeps them, ``[out_features]``,
for as long as the version counters of its own shards of A and B stay the same; whoever changes these in another way
than by torch's operators says so (`ShardedOptimizer.step`). They are computed inside a forward, where the unit is
gathered anyway.

PEFT's `DoraLinearLayer` is not in its documentation: only this module uses it, and `tests/unit/test_norms.py` fails if
it or torch's ``_version`` changes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.quant.matrices import QuantMatrices


class StepNorms(DoraLinearLayer):
    """PEFT's layer of DoRA's magnitudes, with norms that are kept from one forward to the next."""

    _follows: tuple[nn.Parameter, nn.Parameter] | None = None
    _kept: tuple[tuple[int, ...], torch.Tensor] | None = None

    def follow(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Keep the norms while ``a`` and ``b``, as the optimizer sees them, stay the same."""
        self._follows, self._kept = (a, b), None

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, *, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float, base_layer: nn.Module,  # noqa: N803
        base_result: torch.Tensor | None = None, adapter_name: str = "default",
    ) -> torch.Tensor:  # fmt: skip
        """Return what DoRA adds to the base's output, ``[..., out_features]``, as PEFT does.

        ``base_result`` is the base's output with its bias; None if dropout makes ``x`` another input than the base's.
        """
        scale = (self.weight / self.norms(lora_A.weight, lora_B.weight, scaling, base_layer)).view(1, -1)
        product = base_layer(x) if base_result is None else base_result
        if base_layer.bias is not None:
            product = product - base_layer.bias  # type: ignore[operator]
        return (scale - 1) * product + scale * lora_B(lora_A(x)) * scaling

    @torch.no_grad()
    def norms(self, a: torch.Tensor, b: torch.Tensor, scaling: float, base_layer: nn.Module) -> torch.Tensor:
        """Return the norms of the rows of ``W + scaling * b @ a``, ``[out_features]``, which must be gathered."""
        versions = self._versions()
        if versions is None or self._kept is None or self._kept[0] != versions:
            norms = row_norms(base_layer, a, b, scaling)
            if versions is None:
                return norms
            self._kept = versions, norms
        return self._kept[1]

    def _versions(self) -> tuple[int, ...] | None:
        if self._follows is None:
            return None
        return tuple(local_tensor(parameter)._version for parameter in self._follows)


def row_norms(base_layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the norms of the rows of ``W + scaling * b @ a``, ``[out_features]`` in the dtype of W.

    The base's weight is dequantized once, and nothing else is as large.
    """
    weight = cast(torch.Tensor, base_layer.weight).detach()
    a, b = a.to(weight.dtype)[None], b.to(weight.dtype)[None]
    # A batch of one: selective checkpointing keeps the results of `mm` and `addmm` and hands them out in their order,
    # so a forward that computes norms and a recomputation that does not may differ in none of these.
    if isinstance(base_layer, QuantMatrices):  # the weight is a fresh copy
        weight = weight[None].baddbmm_(b, a, alpha=scaling)[0]
    else:
        weight = torch.baddbmm(weight[None], b, a, alpha=scaling)[0]
    return torch.linalg.vector_norm(weight, dim=1)


def keep_norms(model: nn.Module) -> None:
    """Let DoRA's layers of an adapted model keep their norms; before sharding.

    They become instances of a subclass, as `fully_shard` does it; no class is changed.
    """
    for module in model.modules():
        if type(module) is DoraLinearLayer:
            module.__class__ = StepNorms


def follow_adapters(model: nn.Module) -> None:
    """Tell DoRA's layers which A and B their norms follow, once a sharded model has its parameters."""
    for layer in adapted_layers(model).values():
        vectors: Any = getattr(layer, "lora_magnitude_vector", {})
        for name, vector in vectors.items():
            if isinstance(vector, StepNorms):
                pair = (cast(nn.Module, layer).get_submodule(f"{kind}.{name}") for kind in ("lora_A", "lora_B"))
                a, b = (linear.get_parameter("weight") for linear in pair)
                vector.follow(a, b)
