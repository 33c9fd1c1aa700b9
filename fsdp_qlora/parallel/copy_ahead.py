"""Copies the next decoder layers from host memory while one computes, where FSDP gathers from no other rank.

With several ranks, FSDP copies a unit from host memory (`CPUOffloadPolicy`) on its all-gather's streams, ahead of its
use. On one rank there is no all-gather: `FSDPParamGroup.unshard` only records an event, and `wait_for_unshard` copies
on whatever stream is current, which is the compute stream (torch 2.13, ``world_size == 1``). Lists of units to
prefetch change nothing about that. But `FSDPModule.unshard`, called with a side stream current, does all of it there:

    compute   | layer 0 | layer 1 | layer 2 |
    side      |  copy 1 |  copy 2 |  copy 3 |

Two waits make this safe. The compute stream waits for a layer's copy before it uses the layer. The side stream waits
for all that was issued to the compute stream before it starts a copy: the layers resharded so far are then no longer
read, so the copy may take their memory, and no `record_stream` is needed. The layer that computes is issued later, so
the copy runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class CopyAhead:
    """Starts the copy of the next ``depth`` layers when a layer begins its forward or its backward."""

    def __init__(self, layers: Sequence[nn.Module], depth: int, device: torch.device) -> None:
        """Watch ``layers``, which are sharded units in forward order.

        Recomputing a layer does not run its hooks: transformers checkpoints the ``forward`` inside them. A release
        that did run them would copy in vain, but compute the same.
        """
        self._layers: list[FSDPModule] = [layer for layer in layers if isinstance(layer, FSDPModule)]
        self._depth = depth
        self._lane = torch.get_device_module(device)
        self._side = self._lane.Stream()
        self._copied: dict[int, Any] = {}
        """Layer -> event after its copy; of layers that were copied ahead and not used yet."""
        for place, layer in enumerate(self._layers):
            assert isinstance(layer, nn.Module)
            layer.register_forward_pre_hook(partial(self._begin_forward, place))
            layer.register_forward_hook(partial(self._end_forward, place))

    def _begin_forward(self, place: int, *_: Any) -> None:
        if place == 0:
            self._keep_only(())
        self._use(place, range(place + 1, min(place + 1 + self._depth, len(self._layers))))

    def _end_forward(self, place: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(partial(self._begin_backward, place))

    def _begin_backward(self, place: int, _grad: torch.Tensor) -> None:
        self._use(place, range(place - 1, max(place - 1 - self._depth, -1), -1))

    def _use(self, place: int, ahead: Sequence[int]) -> None:
        """Let the compute stream use layer ``place``, and start copying the layers ``ahead``."""
        compute = self._lane.current_stream()
        if (event := self._copied.pop(place, None)) is not None:
            compute.wait_event(event)
        self._keep_only(ahead)
        for following in ahead:
            if following in self._copied:
                continue
            self._side.wait_stream(compute)
            with self._lane.stream(self._side):
                self._layers[following].unshard()
            self._copied[following] = self._side.record_event()

    def _keep_only(self, wanted: Sequence[int]) -> None:
        """Free the layers that were copied ahead and then skipped: later their adapters would be out of date."""
        for skipped in self._copied.keys() - wanted:
            del self._copied[skipped]
            self._layers[skipped].reshard()


def copy_ahead(layers: Sequence[nn.Module], depth: int, device: torch.device) -> None:
    """Copy ``layers`` from host memory ahead of their use, ``depth`` of them; call it after `shard_model`.

    On a CPU, which has no host memory apart, nothing changes.
    """
    if depth and device.type != "cpu":
        CopyAhead(layers, depth, device)
