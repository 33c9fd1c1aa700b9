"""Adapters that are whole on every rank (``fsdp.adapters=replicated``).

`shard_model` has FSDP leave them alone: they are gathered with no layer, and backward only adds up this rank's part of
their gradients. `ReplicatedGradients` adds the parts of all ranks, once a step.
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
    """Called after the last backward of a step, with its number: adds up the whole parameters' gradients.

    All gradients are laid end to end and reduced as one float32 tensor, of which they are views from then on. The
    result has the same bits on every rank (it is added up in one place and sent to all), and so have the updated
    parameters: that is what keeps the copies equal.
    """

    def __init__(self, parameters: Named, ranks: Ranks) -> None:
        """Take those of ``parameters`` that are whole; those that FSDP shards it also reduces.

        Make it while no unit is gathered: a gathered parameter looks like a whole one.
        """
        self._parameters = [p for _, p in parameters if not isinstance(p, DTensor)]
        self._sizes = [p.numel() for p in self._parameters]
        self._ranks = ranks

    @torch.no_grad()
    def __call__(self, step: int = 0) -> None:
        """Reduce; a parameter that no rank has a gradient of is left without one. Every rank calls it."""
        if not self._parameters or self._ranks.size == 1:
            return
        found = [p.grad is not None for p in self._parameters]
        with record_function(GATHER):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
            # How many ranks have each gradient travels along: one that is missing here may be there on another rank.
            counts = torch.tensor(found, dtype=torch.float32, device=grads[0].device)
            flat = torch.cat([*(grad.view(-1) for grad in grads), counts])
        dist.all_reduce(flat, group=self._ranks.group)
        *views, counts = flat.split([*self._sizes, len(found)])
        somewhere = found if all(found) else (counts > 0).tolist()
        for parameter, view, exists in zip(self._parameters, views, somewhere, strict=True):
            parameter.grad = view.view_as(parameter) if exists else None
