"""Stubs for what ``torch.cuda`` lacks in a CPU build: streams, events, properties of a card, and what sets a device.

With the guard of `guard.py` loaded before torch, they make ``cuda`` usable for fake tensors. Stock CPU builds abort the
process in a backward on them (pytorch#92627) and have no streams. All this is for a process of its own.

Streams and events know what happens before what: a stream's clock says how far it has waited for each stream, itself
included (a vector clock, as in Mattern, 1989). `recorder.py` asks them whether a read was ordered after its write.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

Clock = dict[int, int]
"""Number of a stream -> how many of its operations have happened before."""
_NUMBERS = itertools.count()
_STREAMS: list[FakeStream] = []
_HOST: Clock = {}
"""What the host has waited for; whatever it issues later comes after that."""


def _merge(clock: Clock, other: Clock) -> None:
    for number, tick in other.items():
        clock[number] = max(clock.get(number, 0), tick)


class FakeStream:
    """A stream that runs nothing but knows what its work is ordered after, and which stream is current."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(_NUMBERS)
        self.clock: Clock = {}
        _STREAMS.append(self)

    def issue(self) -> int:
        """Issue one operation and return its place in this stream."""
        _merge(self.clock, _HOST)
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.clock[self.number]

    def is_after(self, number: int, tick: int) -> bool:
        """Whether what is issued here now comes after operation ``tick`` of stream ``number``."""
        return max(self.clock.get(number, 0), _HOST.get(number, 0)) >= tick

    def wait_stream(self, stream: FakeStream) -> None:
        """Order this stream's later work after all that was issued to another."""
        _merge(self.clock, stream.clock)

    def wait_event(self, event: FakeEvent) -> None:
        """Order this stream's later work after the event."""
        _merge(self.clock, event.clock)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        """Return the event, or a new one, that stands for the work issued so far."""
        event = event or FakeEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait, and tell the observer."""
        _merge(_HOST, self.clock)
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
    """An event that stands for what was issued to a stream before it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        """Stand for the work issued so far to the stream, by default the current one."""
        self.clock = dict((stream or _CURRENT[-1]).clock)

    def wait(self, stream: FakeStream | None = None) -> None:
        """Order the stream's later work after this event."""
        (stream or _CURRENT[-1]).wait_event(self)

    def synchronize(self) -> None:
        """Let the host wait, and tell the observer."""
        _merge(_HOST, self.clock)
        _OBSERVERS[-1]("event.synchronize")

    def query(self) -> bool:
        """Return True: there is no work."""
        return True


def _nobody(kind: str) -> None:
    """Ignore a synchronisation."""


_CURRENT: list[FakeStream] = [FakeStream()]
_OBSERVERS: list[Callable[[str], None]] = [_nobody]


def current_stream(device: object = None) -> FakeStream:
    """Return the current stream."""
    return _CURRENT[-1]


def compute_stream() -> FakeStream:
    """Return the default stream, on which layers compute."""
    return _CURRENT[0]


def wait_for_current() -> None:
    """Let the host wait for the current stream, as reading a value does."""
    _merge(_HOST, _CURRENT[-1].clock)


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
        for stream in _STREAMS:
            _merge(_HOST, stream.clock)
        _OBSERVERS[-1]("synchronize")

    cuda.Stream, cuda.Event = FakeStream, FakeEvent
    cuda.stream = lambda stream: stream if stream is not None else contextlib.nullcontext()
    cuda.current_stream = current_stream
    cuda.default_stream = lambda device=None: compute_stream()
    cuda._lazy_init = lambda: None
    cuda.current_device = lambda: 0
    # One function for each name: dynamo registers a handler for a function once, and refuses the second
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda.get_device_properties = lambda device=None: _Properties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.mem_get_info = lambda device=None: (79 << 30, 80 << 30)
    cuda.synchronize = synchronize
    torch.accelerator.current_stream = lambda device=None: current_stream(device)
    torch.accelerator.synchronize = lambda device=None: synchronize(device)
    torch.accelerator.set_device_index = lambda device: None
