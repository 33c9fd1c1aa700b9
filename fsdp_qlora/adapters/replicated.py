"""Adapters that are whole on every rank (``fsdp.adapters=replicated``).

`shard_model` excludes them from FSDP: they are never gathered, and backward accumulates only this rank's part of their
gradients. `ReplicatedGradients` sums the parts of all ranks once per step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.scopes import GATHER

Named = Iterable[tuple[str, nn.Parameter]]


class ReplicatedGradients:
    """Sums the gradients of unsharded parameters; call it after the last backward of a step.

    All gradients are concatenated and all-reduced as one float32 tensor; afterwards they are views of it. The result is
    bit-identical on every rank (each sum is computed in one place and sent to all), and so are the updated parameters:
    this keeps the copies equal.
    """

    def __init__(self, parameters: Named, ranks: Ranks) -> None:
        """Select the unsharded ones among ``parameters``; FSDP itself reduces those it shards.

        Create it while no unit is gathered: a gathered parameter looks like an unsharded one.
        """
        self._parameters = [p for _, p in parameters if not isinstance(p, DTensor)]
        self._sizes = [p.numel() for p in self._parameters]
        self._ranks = ranks

    @torch.no_grad()
    def __call__(self) -> None:
        """Reduce the gradients. Parameters without a gradient on any rank stay without one. Every rank must call it."""
        if not self._parameters or self._ranks.size == 1:
            return
        has_gradient = [p.grad is not None for p in self._parameters]
        with record_function(GATHER):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
            # Also sum how many ranks have each gradient: one that is missing here may exist on another rank.
            counts = grads[0].new_ones(len(has_gradient))
            if not all(has_gradient):  # a copy from the host, which waits for the device
                counts.copy_(torch.tensor(has_gradient))
            flat = torch.cat([*(grad.view(-1) for grad in grads), counts])
        dist.all_reduce(flat, group=self._ranks.group)
        *views, counts = flat.split([*self._sizes, len(has_gradient)])
        somewhere = has_gradient if all(has_gradient) else (counts > 0).tolist()
        for parameter, view, exists in zip(self._parameters, views, somewhere, strict=True):
            parameter.grad = view.view_as(parameter) if exists else None
