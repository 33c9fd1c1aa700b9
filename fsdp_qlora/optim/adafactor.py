"""Adafactor (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235) on shards, as `torch.optim.Adafactor` has it.

It is not element-wise: the second moment of a matrix is the product of a mean for each row and one for each column,
and steps are scaled by the root mean square of the whole tensor and of its whole update. With rows on several ranks,
the means of rows are a rank's own; those of columns and all that is one number for a tensor are sums over the ranks.
Two reductions a step carry the sums of all tensors together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.optim.state import Blocks, Leaf, LocalOptimizer, Part

BETA2_DECAY = -0.8
EPS1 = torch.finfo(torch.float32).eps
"""Least second moment."""
EPS2 = 1e-3
"""Least root mean square of a tensor that scales its step: LoRA's B begins with zeros."""


@dataclass
class _Turn:
    """What a step has of one tensor between its reductions."""

    leaf: Leaf
    state: dict[str, Any]
    gradient: torch.Tensor
    """Becomes the update."""
    sums: torch.Tensor
    """Float32: of squares of the values, of the rows' means, of squares in each column (a matrix only)."""


class ShardedAdafactor(LocalOptimizer):
    """Adafactor whose statistics are those of the whole tensors. ``step`` is a collective; it overwrites gradients."""

    def __init__(self, leaves: Sequence[Leaf], settings: OptimSettings) -> None:
        self._leaves, self._weight_decay = tuple(leaves), settings.weight_decay
        super().__init__([leaf.local for leaf in leaves], {"lr": settings.lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all leaves that have a gradient. Ranks with no rows take part."""
        lr = self.param_groups[0]["lr"]
        turns = [self._begin(leaf) for leaf in self._leaves if leaf.local.grad is not None]
        if not turns:
            return
        sums = self._reduce([turn.sums for turn in turns])
        scales = [self._update(turn, s, lr) for turn, s in zip(turns, sums, strict=True)]
        squares = self._reduce([turn.gradient.square().sum().view(1) for turn in turns])
        for turn, scale, square in zip(turns, scales, squares, strict=True):
            root_mean = (square / turn.leaf.numel).sqrt()
            turn.leaf.local.sub_(turn.gradient.mul_(scale / root_mean.clamp(min=1.0)))

    def _begin(self, leaf: Leaf) -> _Turn:
        """Bring this rank's row statistics up to date; return its sums."""
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
            else:  # sharded along a dimension that no mean runs over
                state["col_var"].lerp_(squares.mean(dim=-2, keepdim=True), state["step"] ** BETA2_DECAY)
        else:
            state["variance"].lerp_(gradient.square(), state["step"] ** BETA2_DECAY)
        return _Turn(leaf, state, gradient, torch.cat(sums))

    def _update(self, turn: _Turn, sums: torch.Tensor, lr: float) -> torch.Tensor:
        """Turn the gradient into the update, decay the weights; return the length of the step, float32 ``[]``."""
        state, shape = turn.state, turn.leaf.layout.shape
        rho = min(lr, 1 / sqrt(state["step"]))
        length = (sums[0] / turn.leaf.numel).sqrt().clamp(min=EPS2) * rho
        if self._weight_decay:
            turn.leaf.local.mul_(1 - lr * self._weight_decay)
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
        """Return the sums over the ranks that share the parameters, all in one reduction by way of the device."""
        layout, sizes = self._leaves[0].layout, [part.numel() for part in parts]
        together = torch.cat(list(parts))
        if layout.mesh is not None and layout.num_ranks > 1:
            on_device = together.to(layout.mesh.device_type)
            dist.all_reduce(on_device, group=layout.group)
            together = on_device.to(together.device)
        return list(together.split(sizes))

    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        """Return zeros: a mean for each row and each column, or a value for each element of a vector."""
        shape = leaf.local.shape
        if len(shape) == 1:
            return {"step": step, "variance": leaf.local.new_zeros(shape)}
        return {
            "step": step,
            "row_var": leaf.local.new_zeros((*shape[:-1], 1)),
            "col_var": leaf.local.new_zeros((*shape[:-2], 1, shape[-1])),
        }

    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        """Return row and column statistics; those of a matrix' columns are the same on every rank."""
        state, shape = self.state[leaf.local], leaf.layout.shape
        if len(shape) == 1:
            return [Part("variance", state["variance"], shape)]
        return [
            Part("row_var", state["row_var"], (*shape[:-1], 1)),
            Part("col_var", state["col_var"], (*shape[:-2], 1, shape[-1]), whole=len(shape) == 2),
        ]
