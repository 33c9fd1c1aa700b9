"""Keeps what decoder layers save for backward in host memory (``fsdp.offload=activations``).

While a layer runs forward, the tensors autograd saves are copied to pinned host memory on a side stream, overlapping
the computation. The device's copy is freed one layer later; in backward, a layer's tensors are brought back while the
layer above it computes. So about two layers' tensors are on the device at any time. With activation checkpointing a
layer saves only its input.

Parameters are never moved: FSDP frees and refills their storage itself, and a copy would defeat that. Autograd passes
them as plain tensors, so they are recognised by their storage.

After torchtune's `OffloadActivations` and its descendant in TRL (side stream, bounded number in flight) and
Transformer Engine's offload of whole layers (prefetch of the layer before).
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from fsdp_qlora.distributed.shards import HOST, local_tensor
from fsdp_qlora.errors import NumericsError

LAYERS_ON_DEVICE = 2
"""Layers whose offloaded tensors are on the device at a time: the one in use and the one in transit."""
MIN_BYTES = 1 << 20
"""Smaller tensors stay on the device: the fixed cost of a copy outweighs the memory saved."""
LEAVING = 1
"""Finished layers whose tensors may still be on the device while the next one runs forward."""


class _Kept:
    """A saved tensor: always in host memory, and part of the time also on the device."""

    def __init__(self, call: _Call, here: torch.Tensor, host: torch.Tensor) -> None:
        self.call, self.host = call, host
        self.here: torch.Tensor | None = here
        self._version = here._version

    def require_unchanged(self) -> None:
        """Check that the tensor was not modified since it was saved: the copy might hold either state."""
        if self.here is not None and self._version is not None and self.here._version != self._version:
            raise NumericsError(
                f"fsdp.offload: this model modifies in place a tensor {list(self.here.shape)} that backward needs;"
                " set fsdp.offload=none or params."
            )

    def let_go(self) -> None:
        """Free the device's copy."""
        self.require_unchanged()
        self.here = self._version = None


class _Call:
    """One forward of one layer. Lives as long as autograd holds one of its tensors."""

    def __init__(self, before: _Call | None) -> None:
        self.before = None if before is None else weakref.ref(before)
        self.copied: Any = None
        self.away = False
        self._kept: dict[tuple[Any, ...], weakref.ref[_Kept]] = {}

    def find(self, key: tuple[Any, ...]) -> _Kept | None:
        """Return the tensor kept under ``key``, if autograd still holds it."""
        reference = self._kept.get(key)
        return None if reference is None else reference()

    def add(self, key: tuple[Any, ...], kept: _Kept) -> None:
        """Remember a kept tensor (weakly)."""
        self._kept[key] = weakref.ref(kept)

    def alive(self) -> Iterator[_Kept]:
        """Yield the tensors autograd still holds."""
        for reference in self._kept.values():
            if (kept := reference()) is not None:
                yield kept


class HostActivations:
    """Moves what the watched layers save to the host and back; see the module docstring."""

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES, host: torch.device = HOST) -> None:
        """Move saved tensors of at least ``min_bytes`` between ``device`` and the host.

        On a CPU the same code runs, with real copies and with streams that do nothing.
        """
        self._device, self._min_bytes, self._host = device, min_bytes, host
        self._pinned = device.type != "cpu"
        self._lane = torch.get_device_module(device)
        self._side = self._lane.Stream()
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._call: _Call | None = None
        self._last: weakref.ref[_Call] | None = None
        self._stay: set[int] = set()
        self._leaving: deque[_Call] = deque()
        self._arriving: deque[tuple[_Call, Any, list[torch.Tensor]]] = deque()
        self.bytes_out = 0
        """Bytes copied to the host so far."""
        self.bytes_back = 0
        """Bytes copied back so far."""

    def watch(self, layer: nn.Module) -> None:
        """Move what ``layer`` saves. Call it before `fully_shard`, so that FSDP has gathered before these hooks run."""
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.register_forward_hook(self._end, always_call=True)

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self._wait_for_arrivals()
        while len(self._leaving) > LEAVING:
            call = self._leaving.popleft()
            self._lane.current_stream().wait_event(call.copied)  # before its memory may be reused
            call.away = True
            for kept in call.alive():
                kept.let_go()
        # Tensors that all layers share (rotary tables, masks) are on the device anyway.
        shared = _tensors((args[1:], kwargs))
        self._stay = _storages(itertools.chain(layer.parameters(), layer.buffers(), shared))
        self._call = _Call(self._last() if self._last is not None else None)
        self._hooks.__enter__()

    def _end(self, *_: Any) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        self._hooks.__exit__()
        call.copied = self._side.record_event()
        self._leaving.append(call)
        self._last = weakref.ref(call)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        call = self._call
        if call is None or not self._should_leave(tensor):
            return tensor.detach()
        key = (_storage(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
        if (kept := call.find(key)) is not None:
            return kept
        host = torch.empty_like(tensor, device=self._host, pin_memory=self._pinned)
        self._side.wait_stream(self._lane.current_stream())
        with self._lane.stream(self._side):
            host.copy_(tensor, non_blocking=True)
        self.bytes_out += tensor.nbytes
        kept = _Kept(call, tensor.detach(), host)
        call.add(key, kept)
        return kept

    def _should_leave(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, DTensor) or tensor.layout != torch.strided or tensor.device.type != self._device.type:
            return False
        expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        large = tensor.numel() > 0 and tensor.nbytes >= self._min_bytes
        return large and not expanded and _storage(tensor) not in self._stay

    def _unpack(self, packed: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        packed.require_unchanged()
        call = packed.call
        self._bring_back(call)
        self._wait_for_arrivals(call)
        if call.before is not None and (before := call.before()) is not None:
            self._bring_back(before)
        assert packed.here is not None
        return packed.here

    def _bring_back(self, call: _Call) -> None:
        """Start copying a layer's tensors back to the device, unless they are there."""
        if not call.away:
            return
        call.away, missing = False, list(call.alive())
        # Allocated, and later freed, on the compute stream, and the copy waits for that stream: whatever used this
        # memory before has finished when the copy starts.
        for kept in missing:
            kept.here = torch.empty_like(kept.host, device=self._device)
        self._side.wait_stream(self._lane.current_stream())
        with self._lane.stream(self._side):
            for kept in missing:
                assert kept.here is not None
                kept.here.copy_(kept.host, non_blocking=True)
                self.bytes_back += kept.host.nbytes
        tensors = [kept.here for kept in missing if kept.here is not None]
        self._arriving.append((call, self._side.record_event(), tensors))  # held until a wait: see _wait_for_arrivals

    def _wait_for_arrivals(self, wanted: _Call | None = None) -> None:
        """Make the compute stream wait for the copies of ``wanted`` and all earlier ones, or for all copies.

        Their memory must not be freed earlier, even if nothing ever unpacks them.
        """
        if wanted is not None and all(call is not wanted for call, _, _ in self._arriving):
            return
        while self._arriving:
            call, event, _ = self._arriving.popleft()
            self._lane.current_stream().wait_event(event)
            if call is wanted:
                return


def offload_activations(
    layers: Iterable[nn.Module], device: torch.device, min_bytes: int | None = None,
    host: torch.device = HOST,
) -> HostActivations:  # fmt: skip
    """Keep what ``layers`` save for backward in host memory; call this before `fully_shard`.

    Args:
        layers: decoder layers; the first positional argument of each is its input, the others are shared.
        device: where they compute.
        min_bytes: smaller tensors stay on the device; None means 1 MiB, or 0 on a CPU.
        host: where the copies are kept; a simulated step keeps them where they are not counted.
    """
    if min_bytes is None:
        min_bytes = 0 if device == host else MIN_BYTES
    moved = HostActivations(device, min_bytes, host)
    for layer in layers:
        moved.watch(layer)
    return moved


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {_storage(local_tensor(t)) for t in tensors}


def _storage(tensor: torch.Tensor) -> int:
    """Return an identifier of the tensor's storage; works for fake tensors too, which have no address."""
    return tensor.untyped_storage()._cdata
