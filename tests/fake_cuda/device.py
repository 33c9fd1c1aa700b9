"""Stubs for what ``torch.cuda`` lacks in a CPU build: streams, events, properties of a card, and what sets a device.

With the guard of `guard.py` loaded before torch, they make ``cuda`` usable for fake tensors. Stock CPU builds abort the
process in a backward on them (pytorch#92627) and have no streams. All this is for a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class FakeStream:
    """A stream that does nothing but knows which one is current."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: FakeStream) -> None:
        """Do nothing."""

    def wait_event(self, event: FakeEvent) -> None:
        """Do nothing."""

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        """Return the event, or a new one, that stands for the work issued so far."""
        event = event or FakeEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Tell the observer that the host waits."""
        _OBSERVERS[-1]("stream.synchronize")

    def query(self) -> bool:
        """Return True: there is no work."""
        return True

    def __enter__(self) -> FakeStream:
        _CURRENT.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.pop()


class FakeEvent:
    """An event that does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: FakeStream | None = None) -> None:
        """Do nothing."""

    def wait(self, stream: FakeStream | None = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Tell the observer that the host waits."""
        _OBSERVERS[-1]("event.synchronize")

    def query(self) -> bool:
        """Return True: there is no work."""
        return True


def _nobody(kind: str) -> None:
    """Ignore a synchronisation."""


_CURRENT: list[FakeStream] = [FakeStream()]
_OBSERVERS: list[Callable[[str], None]] = [_nobody]


@contextlib.contextmanager
def observed(note: Callable[[str], None]) -> Iterator[None]:
    """Call ``note`` with the kind of each explicit wait for the device."""
    _OBSERVERS.append(note)
    try:
        yield
    finally:
        _OBSERVERS.pop()


class _Properties:
    """Properties of an imaginary card of 80 GiB and compute capability 9.0."""

    name, total_memory, major, minor, multi_processor_count = "fake", 80 << 30, 9, 0, 132


def install() -> None:
    """Replace what ``torch.cuda`` lacks in a CPU build. Cannot be undone."""
    cuda: Any = torch.cuda

    def synchronize(device: object = None) -> None:
        _OBSERVERS[-1]("synchronize")

    cuda.Stream, cuda.Event = FakeStream, FakeEvent
    cuda.stream = lambda stream: stream if stream is not None else contextlib.nullcontext()
    cuda.current_stream = lambda device=None: _CURRENT[-1]
    cuda.default_stream = lambda device=None: _CURRENT[0]
    cuda._lazy_init = lambda: None
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda.get_device_properties = lambda device=None: _Properties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.mem_get_info = lambda device=None: (79 << 30, 80 << 30)
    cuda.synchronize = synchronize
    torch.accelerator.current_stream = cuda.current_stream
    torch.accelerator.synchronize = synchronize
    torch.accelerator.set_device_index = lambda device: None
