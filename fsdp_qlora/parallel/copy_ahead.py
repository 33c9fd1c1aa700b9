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

Where only some modules are in host memory (`fsdp.offload_modules`), a layer's stage is what it holds of them; a last
stage, after the layers, holds the final norm and the head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

Units = Sequence[FSDPModule]


class CopyAhead:
    """Starts the copies of the next ``depth`` stages when a layer begins its forward or its backward."""

    def __init__(
        self, layers: Sequence[nn.Module], depth: int, device: torch.device, stages: Sequence[Units] | None = None
    ) -> None:
        """Watch ``layers``, in forward order.

        Args:
            layers: what is computed one after the other.
            depth: number of stages to copy ahead.
            device: where to copy to.
            stages: units that each layer uses, and one more stage of those that are used after the last layer. By
                default, each layer is the unit that it uses.

        Recomputing a layer does not run its hooks: transformers checkpoints the ``forward`` inside them. A release
        that did run them would copy in vain, but compute the same.
        """
        self._stages = stages or [[layer] for layer in layers if isinstance(layer, FSDPModule)]
        self._depth = depth
        self._lane = torch.get_device_module(device)
        self._side = self._lane.Stream()
        self._copied: dict[int, Any] = {}
        """Stage -> event after its copies; of stages that were copied ahead and not used yet."""
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._begin_forward, place))
            layer.register_forward_hook(partial(self._end_forward, place))
        for place in range(len(layers), len(self._stages)):
            for unit in self._stages[place]:
                assert isinstance(unit, nn.Module)
                unit.register_forward_pre_hook(partial(self._wait, place))

    def _begin_forward(self, place: int, *_: Any) -> None:
        if place == 0:
            self._keep_only(())
        self._use(place, range(place + 1, min(place + 1 + self._depth, len(self._stages))))

    def _end_forward(self, place: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(partial(self._begin_backward, place))

    def _begin_backward(self, place: int, _grad: torch.Tensor) -> None:
        self._use(place, range(place - 1, max(place - 1 - self._depth, -1), -1))

    def _wait(self, place: int, *_: Any) -> None:
        """Let the compute stream use stage ``place``."""
        if (event := self._copied.pop(place, None)) is not None:
            self._lane.current_stream().wait_event(event)

    def _use(self, place: int, ahead: Sequence[int]) -> None:
        """Let the compute stream use stage ``place``, and start copying the stages ``ahead``."""
        compute = self._lane.current_stream()
        self._wait(place)
        self._keep_only(ahead)
        for following in ahead:
            if following in self._copied or not self._stages[following]:
                continue
            self._side.wait_stream(compute)
            with self._lane.stream(self._side):
                for unit in self._stages[following]:
                    unit.unshard()
            self._copied[following] = self._side.record_event()

    def _keep_only(self, wanted: Collection[int]) -> None:
        """Free the stages that were copied ahead and then skipped: later their adapters would be out of date."""
        for skipped in self._copied.keys() - set(wanted):
            del self._copied[skipped]
            for unit in self._stages[skipped]:
                unit.reshard()


def copy_ahead(layers: Sequence[nn.Module], depth: int, device: torch.device) -> None:
    """Copy ``layers`` from host memory ahead of their use, ``depth`` of them; call it after `shard_model`.

    On a CPU, which has no host memory apart, nothing changes.
    """
    if depth and device.type != "cpu":
        CopyAhead(layers, depth, device)


def host_stages(layers: Sequence[nn.Module], on_host: Iterable[nn.Module], first: nn.Module) -> list[Units]:
    """Return what each layer has in host memory, and last what is used after the layers: the final norm and the head.

    Args:
        layers: the decoder layers, in forward order.
        on_host: units in host memory (`fsdp_qlora.parallel.shard.host_modules`).
        first: the input embedding, which nothing precedes: it is left out.
    """
    units = [module for module in on_host if isinstance(module, FSDPModule) and module is not first]
    inside = [set(layer.modules()) for layer in layers]
    after = [unit for unit in units if not any(unit in modules for modules in inside)]
    return [*([unit for unit in units if unit in modules] for modules in inside), after]


def copy_modules_ahead(
    layers: Sequence[nn.Module], on_host: Iterable[nn.Module], first: nn.Module, depth: int, device: torch.device
) -> None:
    """Copy modules from host memory while the ``depth`` layers before compute; call it after `shard_model`.

    The arguments are those of `host_stages`. On a CPU nothing changes.
    """
    stages = host_stages(layers, on_host, first)
    if depth and device.type != "cpu" and any(stages):
        CopyAhead(layers, depth, device, stages)
