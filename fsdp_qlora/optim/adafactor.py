"""Sharded Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235), equivalent to torch's.

It follows `torch.optim.Adafactor`, but that is not element-wise: the second moment of a matrix is the product of row
means and column means, and steps are scaled by the root mean squares of the whole tensor and its whole update. With
rows on several ranks, each rank computes its own row means; column means and per-tensor scalars are sums over ranks.
Two all-reduces per step carry the sums of all tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.optim.groups import groups_of
from fsdp_qlora.optim.state import Blocks, Leaf, LocalOptimizer, Part

BETA2_DECAY = -0.8
EPS1 = torch.finfo(torch.float32).eps
"""Lower bound on the mean of the row statistics; its square bounds the second moment."""
EPS2 = 1e-3
"""Lower bound on the tensor's root mean square that scales its step: LoRA's B starts at zero."""


@dataclass
class _Turn:
    """One tensor's values between the reductions of a step."""

    leaf: Leaf
    state: dict[str, Any]
    gradient: torch.Tensor
    """The gradient, overwritten by the update."""
    sums: torch.Tensor
    """Float32 sums: squared values; for a matrix also row statistics, and squared gradients per column."""


class ShardedAdafactor(LocalOptimizer):
    """Adafactor with statistics of the whole tensors. ``step`` is a collective and overwrites gradients."""

    def __init__(self, leaves: Sequence[Leaf], settings: OptimSettings) -> None:
        self._leaves = tuple(leaves)
        super().__init__(groups_of(leaves, settings), {"lr": settings.peak_lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all leaves that have a gradient. Ranks without rows must take part."""
        turns = [self._begin(leaf) for leaf in self._leaves if leaf.local.grad is not None]
        if not turns:
            return
        sums = self._reduce([turn.sums for turn in turns])
        scales = [self._update(turn, s) for turn, s in zip(turns, sums, strict=True)]
        squares = self._reduce([turn.gradient.square().sum().view(1) for turn in turns])
        for turn, scale, square in zip(turns, scales, squares, strict=True):
            root_mean = (square / turn.leaf.numel).sqrt()
            turn.leaf.local.sub_(turn.gradient.mul_(scale / root_mean.clamp(min=1.0)))

    def _begin(self, leaf: Leaf) -> _Turn:
        """Update this rank's row statistics and return its sums."""
        if not self.state[leaf.local]:
            self.state[leaf.local] = self.new_state(leaf, 0)
        state, gradient = self.state[leaf.local], leaf.local.grad
        assert gradient is not None
        state["step"] += 1
        sums = [leaf.local.square().sum().view(1)]
        if gradient.dim() > 1:
            squares = gradient.square()
            state["row_var"].lerp_(squares.mean(dim=-1, keepdim=True), state["step"] ** BETA2_DECAY)
            if gradient.dim() == 2:
                sums += [state["row_var"].sum().view(1), squares.sum(dim=0)]
            else:  # sharded along a dimension that is not averaged over
                state["col_var"].lerp_(squares.mean(dim=-2, keepdim=True), state["step"] ** BETA2_DECAY)
        else:
            state["variance"].lerp_(gradient.square(), state["step"] ** BETA2_DECAY)
        return _Turn(leaf, state, gradient, torch.cat(sums))

    def _update(self, turn: _Turn, sums: torch.Tensor) -> torch.Tensor:
        """Turn the gradient into the update and decay the weights; return the step size, float32 ``[]``."""
        state, shape, group = turn.state, turn.leaf.layout.shape, self.group_of(turn.leaf)
        lr, decay = group["lr"], group["weight_decay"]
        rho = min(lr, 1 / sqrt(state["step"]))
        length = (sums[0] / turn.leaf.numel).sqrt().clamp(min=EPS2) * rho
        if decay:
            turn.leaf.local.mul_(1 - lr * decay)
        if len(shape) == 1:
            variance = state["variance"].clone()
        else:
            if len(shape) == 2:
                state["col_var"].lerp_(sums[2:].view(1, -1) / shape[0], state["step"] ** BETA2_DECAY)
                mean = sums[1] / shape[0]
            else:
                mean = state["row_var"].mean(dim=-2, keepdim=True)
            variance = (state["row_var"] @ state["col_var"]).div_(mean.clamp(min=EPS1))
        turn.gradient.mul_(variance.clamp_(min=EPS1 * EPS1).rsqrt_())
        return length

    def _reduce(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums over the ranks that share the parameters, in a single all-reduce on the device."""
        layout, sizes = self._leaves[0].layout, [part.numel() for part in parts]
        together = torch.cat(list(parts))
        if layout.mesh is not None and layout.num_ranks > 1:
            on_device = together.to(layout.mesh.device_type)
            dist.all_reduce(on_device, group=layout.group)
            together = on_device.to(together.device)
        return list(together.split(sizes))

    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        """Return a state of zeros: one mean per row and per column, or one value per element of a vector."""
        shape = leaf.local.shape
        if len(shape) == 1:
            return {"step": step, "variance": leaf.local.new_zeros(shape)}
        return {
            "step": step,
            "row_var": leaf.local.new_zeros((*shape[:-1], 1)),
            "col_var": leaf.local.new_zeros((*shape[:-2], 1, shape[-1])),
        }

    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        """Return row and column statistics; a matrix's column statistics are equal on every rank."""
        state, shape = self.state[leaf.local], leaf.layout.shape
        if len(shape) == 1:
            return [Part("variance", state["variance"], shape)]
        return [
            Part("row_var", state["row_var"], (*shape[:-1], 1)),
            Part("col_var", state["col_var"], (*shape[:-2], 1, shape[-1]), whole=len(shape) == 2),
        ]
