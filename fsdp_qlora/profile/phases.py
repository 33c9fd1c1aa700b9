"""Attributes each nanosecond of a recorded step to one phase, so the phases add up to the step.

On a CPU the time is that of the main thread, which runs forward, backward and update. Events nest; at each moment the
innermost one decides, unless an enclosing one claims everything inside it (`_classify` has the rules). On a device it
is the time of the compute stream, and a kernel belongs to whatever launched it. Time that no rule covers is waiting.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from fsdp_qlora import scopes
from fsdp_qlora.profile.trace import Event, Place, Thread, Trace

PHASES = {
    "gather": "collectives: copies in and out, starting them",
    "dequantize": "4-bit codes to numbers",
    "gemm": "matrix products of linears and adapters",
    "attention": "scores, softmax, weighted sum",
    "elementwise": "norms, activations, similar work, copies",
    "head": "loss head: its products and softmax",
    "optimizer": "gradient norm, update",
    "data": "waiting for the batch",
    "waiting": "for collectives and the device; everything else (Python)",
}
"""Phase -> its description, in the order of the printed table."""
WAITING = "waiting"

_SCOPES = {
    scopes.DATA: "data",
    scopes.OPTIMIZER: "optimizer",
    scopes.HEAD: "head",
    scopes.ATTENTION: "attention",
    scopes.DEQUANTIZE: "dequantize",
    scopes.GATHER: "gather",
}
# On a CPU, FSDP waits for a collective inside these scopes, so their own time is waiting. The events inside them are
# copies and the start of the collective.
_BLOCKS = re.compile(r"FSDP::(all_gather|post_backward_reduce|post_backward_rs_wait)( |$)|.*wait_tensor")
_GATHER = re.compile(
    r"FSDP::|fsdp::|c10d|_c10d_functional|_dtensor|record_param_comms|nccl|gloo:|RegisterPostBackward", re.IGNORECASE
)
_BATCHED = re.compile(r"aten::(bmm|baddbmm|_?softmax\w*|_softmax_backward_data)_?$")
_GEMM = re.compile(
    r"aten::(addmm|_addmm_activation|mm|bmm|baddbmm|matmul|linear|mv|addmv|einsum|_scaled_mm|_grouped_mm)_?$"
    r"|mkldnn|mkl::|onednn|.*(gemm|gemv|cutlass|nvjet|linear|matmul)",
    re.IGNORECASE,
)
_VIEWS = re.compile(
    r"aten::(view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|expand|as_strided|slice|select|narrow|detach"
    r"|unsqueeze|squeeze|split|chunk|empty\w*|resize_|alias)_?$"
)
_RULES = (
    (re.compile(r"Optimizer\."), "optimizer"),
    (re.compile(r".*dequant", re.IGNORECASE), "dequantize"),
    (re.compile(r".*(attention|attn|flash_fwd|flash_bwd|fmha)", re.IGNORECASE), "attention"),
    (re.compile(r".*(cross_?entropy|loss_?head|::head)", re.IGNORECASE), "head"),
)
"""Names that claim everything inside them."""
_ELEMENTWISE = re.compile(r"aten::|prims::|triton_|cpp_fused|graph_\d|.*Compiled")


class _Context(NamedTuple):
    """The phase an event assigns to itself and to the events inside it."""

    own: str = WAITING
    inner: str | None = None
    """Phase of events inside that match no rule of their own."""
    claims: bool = False
    """Whether ``inner`` applies to everything inside, whatever its name."""
    block: bool = False
    """Whether it is inside an attention module."""


class Segment(NamedTuple):
    """An interval of one thread's or stream's time."""

    start: int
    end: int
    phase: str


@dataclass(frozen=True)
class StepPhases:
    """One recorded step of one rank, in nanoseconds."""

    total: int
    phases: dict[str, int]
    """Add up to ``total``."""
    under_way: int
    """Time during which a collective of this rank was in flight, whatever else was happening."""
    waited: int
    """The part of the waiting that falls into ``under_way``."""


@cache
def _classify(name: str, around: _Context) -> _Context:
    """Classify an event inside ``around`` by its name."""
    if name == scopes.ATTENTION_BLOCK:
        return _inherit(around)._replace(block=True)
    phase = _SCOPES.get(name) or ("gather" if _GATHER.match(name) or _BLOCKS.match(name) else None)
    if phase is None and (around.claims or name.startswith("autograd::engine")):
        return _inherit(around)
    phase = phase or _claimed_by(name, around.block)
    if phase is not None:
        return _Context(WAITING if _BLOCKS.match(name) else phase, phase, True, around.block)
    if _GEMM.match(name):
        return _Context("gemm", "gemm", block=around.block)
    if _ELEMENTWISE.match(name) and not (_VIEWS.match(name) and around.inner):
        return _Context("elementwise", "elementwise", block=around.block)
    return _inherit(around)


def _inherit(around: _Context) -> _Context:
    return around._replace(own=around.inner or WAITING)


def _claimed_by(name: str, in_attention: bool) -> str | None:
    """Return the phase that an operator claims for everything inside it, if its name implies one."""
    if in_attention and _BATCHED.match(name):
        return "attention"
    return next((phase for pattern, phase in _RULES if pattern.match(name)), None)


class _Sweep:
    """Sweeps over the events of one thread in order and cuts its time into segments."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._open: list[tuple[int, _Context]] = []
        self._now = 0

    def around(self) -> _Context:
        """Return the context that encloses the next event."""
        return self._open[-1][1] if self._open else _Context()

    def advance(self, time: int) -> None:
        """Close the events that ended by ``time``."""
        while self._open and self._open[-1][0] <= time:
            self._emit(self._open[-1][0])
            self._open.pop()
        self._emit(time)

    def push(self, event: Event, context: _Context) -> None:
        """Open an event, clipped to its enclosing event (timestamps are rounded)."""
        end = min(event.end, self._open[-1][0]) if self._open else event.end
        self._open.append((end, context))

    def _emit(self, time: int) -> None:
        if self._open and time > self._now:
            self.segments.append(Segment(self._now, time, self._open[-1][1].own))
        self._now = max(self._now, time)


def host_segments(events: Iterable[Event], forward_of: dict[Place, Place]) -> dict[Thread, list[Segment]]:
    """Cut each host thread's time into segments of one phase each, with gaps between its outermost events.

    A backward operation has the phase of its forward, which is looked up in ``forward_of``.
    """
    wanted = set(forward_of.values())
    forward: dict[Place, _Context] = {}
    sweeps: dict[Thread, _Sweep] = defaultdict(_Sweep)
    # All threads together in order of time: backward may run in another thread than its forward.
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        sweep, place = sweeps[event.thread], (event.thread, event.start)
        sweep.advance(event.start)
        context = _classify(event.name, sweep.around())
        origin = forward_of.get(place)
        if origin in forward and not event.name.startswith("autograd::engine"):
            context = _backward(forward[origin], context)
        if place in wanted:  # if several begin at once, the innermost one is the operation itself
            forward[place] = context
        sweep.push(event, context)
    for sweep in sweeps.values():
        sweep.advance(2**63)
    return {thread: sweep.segments for thread, sweep in sweeps.items()}


def _backward(forward: _Context, named: _Context) -> _Context:
    """Classify a backward operation, from its forward and from its own name."""
    if named.claims or forward.own in (WAITING, "gather"):
        return named
    return forward


def device_segments(trace: Trace, host: dict[Thread, list[Segment]], main: Thread) -> list[Segment]:
    """Cut the compute stream's time into segments.

    The compute stream is the one with the most work other than collectives. Where it is idle while the host fetches
    data or runs the update (parameters in host memory), the time counts as data or optimizer.
    """
    busy: dict[Thread, int] = defaultdict(int)
    for event in trace.device:
        if not _GATHER.match(event.name):
            busy[event.thread] += event.end - event.start
    stream = max(busy, key=lambda thread: busy[thread])
    launched = {event.correlation: (event.thread, event.start) for event in trace.launches}
    segments: list[Segment] = []
    now = 0
    for event in sorted((e for e in trace.device if e.thread == stream), key=lambda e: e.start):
        start = max(now, event.start)
        if event.end <= start:
            continue
        segments.append(Segment(start, event.end, _kernel_phase(event, launched, host)))
        now = event.end
    on_host = [s for s in host.get(main, []) if s.phase in ("data", "optimizer")]
    return sorted([*segments, *_without(on_host, segments)])


def _kernel_phase(kernel: Event, launched: dict[int | None, Place], host: dict[Thread, list[Segment]]) -> str:
    if _GATHER.match(kernel.name):
        return "gather"
    if kernel.correlation is not None and kernel.correlation in launched:
        thread, time = launched[kernel.correlation]
        segments = host.get(thread, [])
        at = bisect_right(segments, time, key=lambda s: s.start) - 1
        if at >= 0 and segments[at].end >= time and segments[at].phase != WAITING:
            return segments[at].phase
    phase = _classify(kernel.name, _Context()).own  # nothing around its launch identifies it
    return "elementwise" if phase == WAITING else phase


def _without(segments: Iterable[Segment], taken: Sequence[Segment]) -> list[Segment]:
    """Return ``segments`` minus the time of ``taken`` (sorted, not overlapping)."""
    left: list[Segment] = []
    for segment in segments:
        now = segment.start
        for at in range(max(0, bisect_right(taken, now, key=lambda s: s.start) - 1), len(taken)):
            if (other := taken[at]).start >= segment.end:
                break
            if other.start > now:
                left.append(Segment(now, other.start, segment.phase))
            now = max(now, other.end)
        if now < segment.end:
            left.append(Segment(now, segment.end, segment.phase))
    return left


def divide_steps(trace: Trace) -> list[StepPhases]:
    """Return the recorded steps, each with its time divided into phases."""
    windows = sorted((e for e in trace.host if e.name == scopes.STEP), key=lambda e: e.start)
    if not windows:
        return []
    host = host_segments(trace.host, trace.forward_of)
    main = windows[0].thread
    segments = device_segments(trace, host, main) if trace.device else host[main]
    under_way = _collectives(trace, main)
    return [_divide(window, segments, under_way) for window in windows]


def _collectives(trace: Trace, main: Thread) -> list[Segment]:
    """Return when a collective of this rank was in flight: on gloo's own threads, or in NCCL's kernels."""
    names = re.compile(r"gloo:|nccl", re.IGNORECASE)
    events = trace.device or [e for e in trace.host if e.thread != main]
    merged: list[Segment] = []
    for event in sorted((e for e in events if names.match(e.name)), key=lambda e: e.start):
        if merged and event.start <= merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, event.end))
        else:
            merged.append(Segment(event.start, event.end, WAITING))
    return merged


def _divide(window: Event, segments: Sequence[Segment], under_way: Sequence[Segment]) -> StepPhases:
    inside = [
        Segment(max(s.start, window.start), min(s.end, window.end), s.phase)
        for s in segments
        if s.start < window.end and s.end > window.start
    ]
    phases = dict.fromkeys(PHASES, 0)
    for segment in inside:
        phases[segment.phase] += segment.end - segment.start
    total = window.end - window.start
    phases[WAITING] += total - sum(phases.values())  # time that no segment covers
    whole = [Segment(window.start, window.end, WAITING)]
    idle = _without(whole, [s for s in inside if s.phase != WAITING])
    waited = phases[WAITING] - _length(_without(idle, under_way))
    return StepPhases(total, phases, total - _length(_without(whole, under_way)), waited)


def _length(segments: Iterable[Segment]) -> int:
    return sum(s.end - s.start for s in segments)
