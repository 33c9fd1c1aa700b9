"""Orders what a walk issues to its streams: reads that no wait orders after their write, and copies that run alone.

An operation on a stream comes after the earlier ones there and after what the stream waited for (`device.FakeStream`).
A tensor must be written before it is read or written again, and read before it is written again; anything else is a
race. Storages are compared, not addresses: that the allocator gives memory to another tensor too early is not seen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tests.fake_cuda.device import compute_stream, current_stream

Place = tuple[int, int]
"""A stream's number, and an operation's place in it."""


def _on_device(values: object) -> Iterator[int]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            yield value.untyped_storage()._cdata


class Order:
    """What was issued to the streams, in which order the device may run it."""

    def __init__(self) -> None:
        self.races: list[str] = []
        """What may run too early."""
        self.arrived: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Phase -> ``beside``, ``alone`` -> bytes copied to the device while something else could compute, or not."""
        self._written: dict[int, Place] = {}
        self._read: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._copying: list[tuple[str, Place, int, int]] = []

    def made(self, out: object) -> None:
        """Note new tensors, whose storages may have the numbers of earlier ones."""
        for storage in _on_device(out):
            self._written.pop(storage, None)
            self._read.pop(storage, None)

    def issue(self, func: Any, args: Any, kwargs: Any, out: object, where: Callable[[], str]) -> None:
        """Note an operation on the current stream that returned ``out``."""
        named = zip(func._schema.arguments, args, strict=False)
        values = [*named, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
        changed = [v for a, v in values if a.alias_info is not None and a.alias_info.is_write]
        given, changes = set(_on_device((args, kwargs))), set(_on_device(changed))
        self.made([t for t in tree_leaves(out) if not given & set(_on_device(t))])
        self._issue(func._schema.name, given, changes, set(_on_device(out)) - given, where)

    def wrote(self, name: str, tensors: list[torch.Tensor], where: Callable[[], str]) -> None:
        """Note a kernel on the current stream that may write all of ``tensors``."""
        given = set(_on_device(tensors))
        self._issue(name, given, given, set(), where)

    def _issue(self, name: str, given: set[int], changes: set[int], new: set[int], where: Callable[[], str]) -> None:
        stream = current_stream()
        for storage in given | changes:
            before = [self._written[storage]] if storage in self._written else []
            if storage in changes:
                before += self._read[storage].items()
            if not all(stream.is_after(*place) for place in before):
                self.races.append(f"{name} @ {where()} does not wait for another stream")
        self._settle()
        tick = stream.issue()
        for storage in given - changes:
            self._read[storage][stream.number] = tick
        for storage in changes | new:
            self._written[storage] = (stream.number, tick)
            self._read.pop(storage, None)

    def copied(self, phase: str, num_bytes: int) -> None:
        """Note that the operation just issued copies from the host."""
        stream, compute = current_stream(), compute_stream().number
        place = (stream.number, stream.clock[stream.number])
        self._copying.append((phase, place, stream.clock.get(compute, 0), num_bytes))

    def _settle(self) -> None:
        """Count the copies that the compute stream waits for, if it does not only wait but has work beside them.

        A copy runs beside the operations of the compute stream that it does not wait for and that do not wait for it.
        """
        compute, waiting = compute_stream(), []
        for copy in self._copying:
            phase, place, earlier, num_bytes = copy
            if compute.is_after(*place):
                beside = compute.clock.get(compute.number, 0) > earlier
                self.arrived[phase]["beside" if beside else "alone"] += num_bytes
            else:
                waiting.append(copy)
        self._copying = waiting
