"""The parts of the GPU table, each useful alone: a part yields ways by name, and what measures each.

A way that comes twice adds to its row.

Packed rows of 2,048 random tokens (64 in a dry run), NF4 with double quantization, r 16 on all linears, AdamW. Ways run
one after the other, not by turns: two do not fit on a device.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.digests import digests
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.shapes import Shape, write_shape
from benchmarks.gpu.simulated import simulated
from benchmarks.gpu.suite import SMALL, run_suite
from benchmarks.ranks import TIME_IS_UP, Way, WayFailed
from benchmarks.step_rows import draw_rows
from benchmarks.step_spec import Spec

Row = dict[str, Any]
Task = tuple[str, Callable[[], Row]]
"""A way's name, and what returns its row."""
SHORTEST = 20.0
"""Seconds of a part below which it starts no other way."""
TOO_LATE = "not started: the part's time was up"


@dataclass(frozen=True)
class Job:
    """What all parts share."""

    facts: Facts
    scratch: Path
    deadline: float
    """`time.monotonic` at which the part ends."""
    small: bool
    rounds: int
    steps: int
    """Steps of a round."""
    packages: Path | None = None
    """Folder of packages that only peers see: torchtune's torchao is one that PEFT refuses to stand beside."""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return 64 if self.small else 2048

    def many(self, rows: int) -> int:
        """Return the rows of a micro-batch: fewer in a dry run."""
        return min(rows, 4) if self.small else rows

    def shape(self, key: str) -> tuple[Shape, Path]:
        """Write a shape's folder and its rows; return them."""
        shape = write_shape(key, self.scratch / key, self.small)
        rows = self.scratch / f"{key}.json"
        draw_rows(rows, self.length, 64, shape.vocab_size)
        return shape, rows


PACKED = {"data": {"packing": True}}


def _ours(shape: Shape, rows: Path, batch: int, checkpointing: str = "auto", **groups: dict[str, Any]) -> Spec:
    overrides = {**PACKED, **groups}
    overrides["train"] = {"activation_checkpointing": checkpointing, **overrides.get("train", {})}
    return Spec("ours", str(shape.folder), str(rows), batch=batch, drawn=True, overrides=overrides)


def measure(job: Job, shape: Shape, spec: Spec, num_ranks: int = 1, packages: Path | None = None) -> Row:
    """Start a way, train rounds of steps until they are enough or time is up, and return its row."""
    row: Row = {
        "shape": shape.name, "ranks": num_ranks, "length": job.length, "batch": spec.batch,
        "weights_of_token": shape.weights_of_token, "spec": dataclasses.asdict(spec),
    }  # fmt: skip
    if job.small and spec.way == "ours":  # a busy machine makes tiny operations wait for their threads
        spec = dataclasses.replace(spec, overrides={**spec.overrides, "launcher": {"threads_per_rank": 1}})
    speeds: list[float] = []
    way = None
    try:
        way = Way(spec, num_ranks, job.scratch, job.deadline, packages=packages)
        known = {k: v for k, v in way.first[0].items() if k not in ("first_step", "load_allocated")}
        row |= known | {"first_step_seconds": max(a["first_step"] for a in way.first), **_largest(way.first, LOADING)}
        row |= _largest(way.steps(1), MEMORY)  # the second step warms up what the first did not
        while len(speeds) < job.rounds:
            answers = way.steps(job.steps)
            speeds.append(num_ranks * job.length * spec.batch * job.steps / max(a["seconds"] for a in answers))
            row |= _speed(speeds, num_ranks * job.length * spec.batch) | _largest(answers, MEMORY)
    except WayFailed as failure:
        row |= {k: v for k, v in failure.answer.items() if v is not None}
        if speeds and failure.answer["failed"] == TIME_IS_UP:
            row["failed"] = f"after {len(speeds)} of {job.rounds} rounds, time was up"
    finally:
        if way is not None:
            way.close()
    return row


MEMORY, LOADING = ("allocated", "reserved"), ("load_allocated",)


def _largest(answers: list[Row], keys: tuple[str, ...]) -> Row:
    """Return the largest value over the ranks, of those keys that they have."""
    return {key: max(a[key] for a in answers) for key in keys if answers[0].get(key) is not None}


def _speed(speeds: list[float], tokens: int) -> Row:
    median = statistics.median(speeds)
    return {
        "tokens_per_second": median, "lowest": min(speeds), "highest": max(speeds), "rounds": len(speeds),
        "step_seconds": tokens / median,
    }  # fmt: skip


def tests(job: Job) -> Iterator[Task]:
    """Run tests/gpu, and compare digests of quantized bytes with a CPU's."""
    yield "digests", lambda: digests(job.left)
    yield "tests/gpu", lambda: run_suite(job.facts["accelerator"] is None, SMALL if job.small else (), job.left)


def llama8b(job: Job) -> Iterator[Task]:
    """Measure ours on an 8B Llama, micro-batches of 2 and 16, beside our own trainer on a bf16 base."""
    shape, rows = job.shape("llama8b")
    few, many = job.many(2), job.many(16)
    bf16 = {"quant": {"name": "none"}}
    varlen = {"model": {"attn_implementation": "varlen"}}
    yield from _each(job, shape, {
        f"ours, {few} rows": _ours(shape, rows, few),
        f"ours, {many} rows": _ours(shape, rows, many),
        f"ours, bf16 base, {few} rows": _ours(shape, rows, few, **bf16),
        f"ours, bf16 base, {many} rows": _ours(shape, rows, many, **bf16),
        f"ours, varlen attention, {few} rows": _ours(shape, rows, few, **varlen),
        f"ours, not compiled, {few} rows": _ours(shape, rows, few, train={"compile": "false"}),
        f"ours, kernels=liger, {few} rows": _ours(shape, rows, few, train={"kernels": "liger"}),
        f"ours, kernels=compile, {few} rows": _ours(shape, rows, few, train={"kernels": "compile", "compile": "false"}),
    })  # fmt: skip


def _each(job: Job, shape: Shape, specs: dict[str, Spec]) -> Iterator[Task]:
    for name, spec in specs.items():
        yield name, partial(measure, job, shape, spec)


def memory(job: Job) -> Iterator[Task]:
    """Compare plan and simulation with what was allocated and reserved; few steps, for speed is not the point."""
    shape, rows = job.shape("llama8b")
    few, many = job.many(2), job.many(16)
    eager = {"train": {"compile": "false"}}
    lean = {"optim": {"name": "adamw_8bit"}, **eager}
    offloaded = {"fsdp": {"offload": "activations"}, **eager}
    specs = {
        f"no checkpointing, {few} rows": _ours(shape, rows, few, "none", **eager),
        f"full checkpointing, {few} rows": _ours(shape, rows, few, "full", **eager),
        f"full checkpointing, {many} rows": _ours(shape, rows, many, "full", **eager),
        f"selective checkpointing, {few} rows": _ours(shape, rows, few, "selective", **eager),
        f"adamw_8bit, full checkpointing, {few} rows": _ours(shape, rows, few, "full", **lean),
        f"offloaded activations, full checkpointing, {many} rows": _ours(shape, rows, many, "full", **offloaded),
        f"bf16 base, full checkpointing, {few} rows": _ours(
            shape, rows, few, "full", quant={"name": "none"}, **eager
        ),
    }  # fmt: skip
    yield from _each(dataclasses.replace(job, rounds=1, steps=1), shape, specs)
    for name, spec in specs.items():  # later: a table without simulations is one already
        yield name, partial(_simulate, job, spec)


def _simulate(job: Job, spec: Spec) -> Row:
    return simulated(spec, job.length, 1, job.left)


def peers(job: Job) -> Iterator[Task]:
    """Measure TRL, plain and sharded by accelerate's FSDP2, beside ours with the same checkpointing."""
    shape, rows = job.shape("llama8b")
    few = job.many(2)
    for full in (False, True):
        added = ", full checkpointing" if full else ""
        yield from _each(job, shape, {f"ours{added}": _ours(shape, rows, few, "full" if full else "none")})
        for name, fsdp in ((f"TRL{added}", False), (f"TRL, FSDP2{added}", True)):
            spec = Spec("trl", str(shape.folder), str(rows), batch=few, fsdp=fsdp, drawn=True, checkpointing=full)
            yield name, partial(_peer, job, shape, spec, "trl")


def _peer(job: Job, shape: Shape, spec: Spec, package: str, num_ranks: int = 1) -> Row:
    """Measure a peer, or say why it cannot run here."""
    absent = None
    packages = None
    if find_spec(package) is None:
        apart = [] if job.packages is None else [str(job.packages)]
        packages = job.packages if PathFinder.find_spec(package, apart) is not None else None
        absent = "not installed" if packages is None else None
    elif spec.fsdp and job.facts["accelerator"] is None:
        absent = "accelerate shards on accelerators only"
    if absent is not None:
        return {"shape": shape.name, "ranks": num_ranks, "failed": absent}
    return measure(job, shape, spec, num_ranks, packages)


def moe(job: Job) -> Iterator[Task]:
    """Measure ours on a mixture of 128 experts."""
    yield from _of_shape(job, "moe", (2, 8))


def dense32b(job: Job) -> Iterator[Task]:
    """Measure ours on 32 billion weights."""
    yield from _of_shape(job, "dense32b", (2, 8))


def _of_shape(job: Job, key: str, batches: tuple[int, ...]) -> Iterator[Task]:
    shape, rows = job.shape(key)
    yield from _each(job, shape, {f"ours, {n} rows": _ours(shape, rows, n) for n in map(job.many, batches)})


def mistral7b(job: Job) -> Iterator[Task]:
    """Measure ours on a 7B Mistral beside TRL, and Unsloth and torchtune where they are installed."""
    shape, rows = job.shape("mistral7b")
    few = job.many(2)
    yield from _each(job, shape, {"ours": _ours(shape, rows, few, "none")})
    for name, package in (("TRL", "trl"), ("Unsloth", "unsloth"), ("torchtune", "torchtune")):
        spec = Spec(package, str(shape.folder), str(rows), batch=few, drawn=package != "torchtune")
        yield name, partial(_peer, job, shape, spec, package)


def cards(job: Job) -> Iterator[Task]:
    """Measure ours and TRL on all cards of the machine (in a dry run: on two ranks of the CPU)."""
    num_ranks = 2 if job.facts["accelerator"] is None else job.facts["cards"]
    if num_ranks < 2:
        yield "all cards", lambda: {"ranks": num_ranks, "failed": "this machine has one card"}
        return
    shape, rows = job.shape("llama8b")
    few = job.many(2)
    sharded, chosen = _ours(shape, rows, few), _ours(shape, rows, few, fsdp={"shard_degree": "auto"})
    yield "ours, sharded", partial(measure, job, shape, sharded, num_ranks)
    yield "ours, fsdp.shard_degree=auto", partial(measure, job, shape, chosen, num_ranks)
    for name, fsdp in (("TRL, DDP", False), ("TRL, FSDP2", True)):
        spec = Spec("trl", str(shape.folder), str(rows), batch=few, fsdp=fsdp, drawn=True)
        yield name, partial(_peer, job, shape, spec, "trl", num_ranks)


PARTS: dict[str, Callable[[Job], Iterator[Task]]] = {
    "tests": tests, "llama8b": llama8b, "memory": memory, "peers": peers, "moe": moe, "dense32b": dense32b,
    "mistral7b": mistral7b, "cards": cards,
}  # fmt: skip
