"""Optimizers on the local shards of DTensors.

Element-wise optimizers do the same on a shard as on the whole, so torch's own run on the plain local tensors; their
state is presented as DTensors again where it is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.dist.mesh import Ranks


class ShardedOptimizer:
    """A torch optimizer over this rank's shards of the trainable parameters."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings) -> None:
        """Build the optimizer; ``parameters`` are ``(name, DTensor parameter)`` as a checkpoint should name them."""
        self.parameters = dict(parameters)
        self.settings = settings
        self._leaves = {name: nn.Parameter(_local(p)) for name, p in self.parameters.items()}
        self._optimizer = _build(list(self._leaves.values()), settings)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that runs on the local shards."""
        return self._optimizer

    def grad_square_sum(self, ranks: Ranks) -> float:
        """Return this rank's part of the gradient's sum of squares, added in float64; the parts of all add up to it."""
        total = 0.0
        for whole, copies in ((False, ranks.num_replicas), (True, ranks.size)):
            chosen = [
                p.grad for p in self.parameters.values() if isinstance(p, DTensor) != whole and p.grad is not None
            ]
            grads = [grad for grad in map(_local, chosen) if grad.numel()]
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
            total += float(torch.stack(norms).square().sum()) / copies if norms else 0.0
        return total

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update the parameters with learning rate ``lr`` and gradients times ``grad_scale``; drop the gradients."""
        for name, parameter in self.parameters.items():
            leaf = self._leaves[name]
            # FSDP lays its shards anew when it first runs, so the leaf looks where the shard is now.
            leaf.data = _local(parameter)
            leaf.grad = None if parameter.grad is None else _local(parameter.grad)
            if leaf.grad is not None and grad_scale != 1.0:
                leaf.grad.mul_(grad_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self._leaves[name].grad = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the per-element state as DTensors, ``<parameter>.<state>`` -> tensor; empty before the first step.

        Scalar step counters are not here: every one equals the run's own step.
        """
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self._optimizer.state.get(self._leaves[name], {}).items():
                if isinstance(value, torch.Tensor) and value.shape == self._leaves[name].shape and key != "step":
                    found[f"{name}.{key}"] = _as_sharded(value, parameter)
        return found

    def prepare_state(self, step: int) -> None:
        """Create the state as after ``step`` updates, filled with zeros, for a checkpoint to be loaded into."""
        for leaf in self._leaves.values():
            self._optimizer.state[leaf] = _empty_state(self.settings, leaf, step)

    def state_bytes(self) -> int:
        """Return the bytes of state this rank holds."""
        states: list[dict[str, Any]] = list(self._optimizer.state.values())
        return sum(v.numel() * v.element_size() for s in states for v in s.values() if isinstance(v, torch.Tensor))


def _build(leaves: list[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    if settings.name == "adamw":
        return torch.optim.AdamW(
            leaves, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
            weight_decay=settings.weight_decay, fused=False, foreach=True,
        )  # fmt: skip
    return torch.optim.SGD(leaves, lr=settings.lr, momentum=settings.beta1, weight_decay=settings.weight_decay)


def _empty_state(settings: OptimSettings, leaf: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    if settings.name == "adamw":
        return {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.zeros_like(leaf),
            "exp_avg_sq": torch.zeros_like(leaf),
        }
    return {"momentum_buffer": torch.zeros_like(leaf)} if settings.beta1 else {}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _as_sharded(local: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
