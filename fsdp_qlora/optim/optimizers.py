"""Optimizers on the local shards of DTensors.

Element-wise optimizers compute the same on a shard as on the whole tensor, so torch's own run on the plain local
tensors. bitsandbytes' do not support DTensor either (`bnb.py`), and adafactor is our own (`adafactor.py`). Their state
is wrapped in DTensors when it is saved (`state.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import HOST, local_tensor
from fsdp_qlora.optim.adafactor import ShardedAdafactor
from fsdp_qlora.optim.bnb import UPDATES, BlockwiseOptimizer
from fsdp_qlora.optim.groups import SCALE, Rate, groups_of
from fsdp_qlora.optim.state import (
    Blocks,
    Layout,
    Leaf,
    LocalOptimizer,
    Part,
    StateLoad,
    parts_of,
    present,
)


class ShardedOptimizer:
    """An optimizer over this rank's shards of the trainable parameters."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimSettings,
        rates: Mapping[str, Rate] | None = None,
    ) -> None:
        """Build the optimizer.

        Args:
            parameters: ``(name, parameter)`` with the names for checkpoints.
            settings: the settings; LoRA+'s ratio is in ``rates`` already.
            rates: the learning rates of parameters that do not learn at the run's.
        """
        self.parameters, self.settings, rates = dict(parameters), settings, rates or {}
        self._leaves = [
            Leaf(n, nn.Parameter(local_tensor(p).detach()), Layout.of(p)) for n, p in self.parameters.items()
        ]
        for i, leaf in enumerate(self._leaves):
            if (rate := rates.get(leaf.name)) is not None:
                self._leaves[i] = replace(leaf, lr_scale=rate.scale, weight_decay=rate.weight_decay)
        self._optimizer = OPTIMIZERS[settings.name](self._leaves, settings)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that runs on the local shards."""
        return self._optimizer

    @property
    def notice(self) -> str | None:
        """A notice for users of this optimizer on this device, or None."""
        if not self.settings.name.startswith("paged_") or self._leaves[0].local.device.type != "cpu":
            return None
        plain = "adamw_8bit" if self.settings.name.endswith("_8bit") else "adamw"
        return f"optim={self.settings.name}: the optimizer is on the CPU, where nothing is paged; it runs as {plain}."

    def grad_square_sum(self, ranks: Ranks) -> torch.Tensor:
        """Return this rank's part of the gradient's sum of squares, float64 ``[]``; all ranks' parts add up to it."""
        # A shard exists on each of `num_replicas` ranks and an unsharded gradient on all, so each counts for its share.
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for whole, copies in ((False, ranks.num_replicas), (True, ranks.size)):
            chosen = [
                p.grad for p in self.parameters.values() if isinstance(p, DTensor) != whole and p.grad is not None
            ]
            grads = [grad for grad in map(local_tensor, chosen) if grad.numel()]
            if grads:
                norms = torch.stack(torch._foreach_norm(grads, dtype=torch.float64))  # type: ignore[reportPrivateImportUsage]
                total += (norms.square().sum() / copies).to(ranks.device, non_blocking=True)
        return total

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update the parameters with learning rate ``lr`` and gradients times ``grad_scale``; drop the gradients.

        With LoRA+, ``lr`` is the learning rate of the matrices A.
        """
        for leaf in self._leaves:
            parameter = self.parameters[leaf.name]
            # FSDP moves its shards to new storage when it first runs, so refresh the leaf's view of the shard.
            leaf.local.data = local_tensor(parameter).detach()
            leaf.local.grad = None if parameter.grad is None else local_tensor(parameter.grad).detach()
        grads = [leaf.local.grad for leaf in self._leaves if leaf.local.grad is not None]
        if grads and grad_scale != 1.0:
            torch._foreach_mul_(grads, grad_scale)  # type: ignore[reportPrivateImportUsage]
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group[SCALE]
        self._optimizer.step()
        # Leaves have counters of their own, and bitsandbytes writes past them; DoRA's norms watch the parameters'.
        torch.autograd.graph.increment_version([local_tensor(parameter) for parameter in self.parameters.values()])
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for leaf in self._leaves:
            self.parameters[leaf.name].grad = leaf.local.grad = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the state as DTensors, ``<parameter>.<state>`` -> tensor; empty before the first step.

        Scalar step counters are omitted: they all equal the run's step. 8-bit states consist of codes and, under
        ``<state>_absmax``, the table of their blocks' absmax (`blockwise.py`).
        """
        tensors: dict[str, torch.Tensor] = {}
        for leaf, part in parts_of(self._leaves, self._optimizer):
            tensors |= present(leaf, part)
        return tensors

    def prepare_state(self, step: int) -> None:
        """Create a state of zeros with step counters at ``step``."""
        for leaf in self._leaves:
            self._optimizer.state[leaf.local] = self._optimizer.new_state(leaf, step)

    def load_state(self, step: int, saved: Mapping[str, Sequence[int]]) -> StateLoad:
        """Return the tensors to load a checkpoint of ``step`` into; ``finish`` then copies them into the optimizer.

        Args:
            step: number of updates made so far.
            saved: shapes of the saved state, by the names of `state_tensors`.
        """
        self.prepare_state(step)
        return StateLoad(self._leaves, self._optimizer, saved)

    def state_bytes(self) -> int:
        """Return the bytes of state on this rank, without step counters (`optim/sizes.py` predicts the same number)."""
        states: list[dict[str, Any]] = list(self._optimizer.state.values())
        tensors = [v for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
        return sum(v.numel() * v.element_size() for v in tensors)


class _AdamW(LocalOptimizer, torch.optim.AdamW):
    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        counters_on = leaf.local.device if self.defaults["fused"] else HOST  # where torch's own first step makes them
        return {
            "step": torch.full((), float(step), device=counters_on),
            "exp_avg": torch.zeros_like(leaf.local),
            "exp_avg_sq": torch.zeros_like(leaf.local),
        }

    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        return [Part(name, self.state[leaf.local][name], leaf.layout.shape) for name in ("exp_avg", "exp_avg_sq")]


class _SGD(LocalOptimizer, torch.optim.SGD):
    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        return {"momentum_buffer": torch.zeros_like(leaf.local)} if self.param_groups[0]["momentum"] else {}

    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        momentum = self.state[leaf.local].get("momentum_buffer")
        return [] if momentum is None else [Part("momentum_buffer", momentum, leaf.layout.shape)]


def _adamw(leaves: list[Leaf], settings: OptimSettings) -> LocalOptimizer:
    # On a device, one kernel reads and writes each element once, and there are no temporaries. On a CPU, where there is
    # no launch to save, the update stays the one whose bits docs/numerics.md promises.
    fused = leaves[0].local.device != HOST
    return _AdamW(
        groups_of(leaves, settings), lr=settings.peak_lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
        fused=fused, foreach=not fused,
    )  # fmt: skip


def _sgd(leaves: list[Leaf], settings: OptimSettings) -> LocalOptimizer:
    return _SGD(groups_of(leaves, settings), lr=settings.peak_lr, momentum=settings.beta1)


OPTIMIZERS: choices.Table[Callable[[list[Leaf], OptimSettings], LocalOptimizer]] = choices.Table(
    "optim", {**dict.fromkeys(UPDATES, BlockwiseOptimizer), "adafactor": ShardedAdafactor, "adamw": _adamw, "sgd": _sgd}
)
"""The optimizers of ``optim=``."""
