"""Reads the Chrome trace exported by torch's profiler (a public format) as intervals in whole nanoseconds."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_HOST = frozenset({"cpu_op", "user_annotation"})
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCH = ("_runtime", "_driver")
"""Suffixes of the categories of calls that launch device work (``cuda_runtime``, ``xpu_driver`` ...)."""

Thread = int | str
"""A host thread, or a device stream."""
Place = tuple[Thread, int]
"""(thread, start time) of a host event."""


class Event(NamedTuple):
    """A named interval from ``start`` to ``end`` (in nanoseconds of the trace's own clock)."""

    name: str
    thread: Thread
    start: int
    end: int
    correlation: int | None = None
    """Id that links a launch to its work on the device."""


@dataclass
class Trace:
    """The events recorded on one rank."""

    host: list[Event] = field(default_factory=list)
    """Operators and scopes, by thread."""
    launches: list[Event] = field(default_factory=list)
    """Host calls that launched work on a device."""
    device: list[Event] = field(default_factory=list)
    """Kernels and copies; ``thread`` is the stream."""
    forward_of: dict[Place, Place] = field(default_factory=dict)
    """Start of a backward operation -> start of the forward operation it belongs to."""


class _Flow(NamedTuple):
    """One end of an arrow from forward to backward."""

    number: int
    is_start: bool
    place: Place


def read_trace(file: Path) -> Trace:
    """Read what `torch.profiler.profile.export_chrome_trace` wrote (gzipped)."""
    with gzip.open(file, "rt") as stream:
        # The hook turns each event into a small tuple while parsing: dictionaries take several times the memory.
        read = json.load(stream, object_hook=_slim)
    trace = Trace()
    starts: dict[int, Place] = {}
    ends: dict[int, Place] = {}
    for item in read["traceEvents"]:
        if isinstance(item, _Flow):
            (starts if item.is_start else ends)[item.number] = item.place
        elif isinstance(item, tuple):
            getattr(trace, item[0]).append(item[1])
    trace.forward_of = {place: starts[number] for number, place in ends.items() if number in starts}
    return trace


def _slim(item: dict[str, Any]) -> Any:
    kind, phase = item.get("cat"), item.get("ph")
    if kind == "fwdbwd" and phase in ("s", "f"):
        return _Flow(item["id"], phase == "s", (item["tid"], _nanoseconds(item["ts"])))
    if phase != "X" or not isinstance(kind, str):
        return item if "traceEvents" in item or "correlation" in item or "stream" in item else None
    arguments = item.get("args") or {}
    group = "host" if kind in _HOST else "device" if kind in _DEVICE else "launches" if kind.endswith(_LAUNCH) else None
    if group is None:
        return None
    start = _nanoseconds(item["ts"])
    thread = arguments.get("stream", item["tid"]) if group == "device" else item["tid"]
    length = max(0, _nanoseconds(item["dur"]))
    return group, Event(item["name"], thread, start, start + length, arguments.get("correlation"))


def _nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)
