"""The sections of the page about how a run went: memory, time, data, choices, settings, how to repeat it."""

from __future__ import annotations

import shlex
from typing import Any

from fsdp_qlora.profile.phases import PHASES
from fsdp_qlora.report.blocks import Block, Code, Note, Picture, Sample, Table, cut
from fsdp_qlora.report.metrics import mapping, mappings, number
from fsdp_qlora.report.numbers import NOT_KNOWN, bytes_of, count_of, duration_of, figure, rows_of, words
from fsdp_qlora.report.pictures import Artist
from fsdp_qlora.report.record import Run
from fsdp_qlora.report.settings import settings_of
from fsdp_qlora.track.console import megabytes

_TENSORS = "max_memory_allocated"
"""``memory_kind`` where the measured bytes are those of tensors on the device."""


def memory(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return the memory planned beside simulated beside measured."""
    plan, ranks = mapping(run.start.get("plan")), mappings(run.summary.get("ranks"))
    kind = run.summary.get("memory_kind")
    planned = number(plan, "peak_planned_bytes") or number(run.summary, "planned_bytes_per_rank")
    simulated, process = number(run.plan, "peak_simulated_bytes"), number(run.summary or run.start, "process_bytes")
    measured = max((m for rank in ranks if (m := number(rank, "peak_memory_bytes")) is not None), default=None)
    if measured is None:
        lines = [m for line in run.metrics.steps if (m := number(line, "peak_memory_bytes")) is not None]
        measured = max(lines, default=None)
    if planned is None and measured is None:
        return []
    more = 0.0 if kind == _TENSORS or process is None else process
    values = {"planned": planned, "simulated": simulated, "measured": measured}
    whole = {name: value + (more if name != "measured" else 0.0) for name, value in values.items() if value is not None}
    tensors = {"planned": planned, "simulated": simulated, "measured": measured if kind == _TENSORS else None}
    rows = [["tensors at the fullest moment", *(NOT_KNOWN if v is None else megabytes(v) for v in tensors.values())]]
    if more:
        rows.append(["with the process", *(megabytes(whole[n]) if n in whole else NOT_KNOWN for n in values)])
    summary = f"Highest peak of a rank: {'; '.join(f'{name} {megabytes(value)}' for name, value in whole.items())}."
    if measured and planned is not None:
        summary += f" The plan is {100 * whole['planned'] / measured:.0f} % of the measured peak"
        summary += f", with {megabytes(more)} for Python and its libraries." if more else "."
    table = Table("Planned, simulated and measured", ("what", *values), rows)
    svg = artist.bars({name: value / 1e9 for name, value in whole.items()}, "GB", prefix, summary)
    blocks: list[Block] = [Picture("Planned beside simulated beside measured", summary, svg, table)]
    if run.summary.get("profile"):
        blocks.append(Note("The steps were profiled: what was measured has the profiler's own memory in it."))
    if simulated is None:
        blocks.append(Note("The step was not simulated. This does it and writes the page again:"))
        blocks.append(Code("", shlex.join(["fsdp-qlora", "report", str(run.folder), "simulate=true"])))
    kinds, moments = _bytes(plan.get("bytes_per_rank")), _bytes(plan.get("bytes_at_moment"))
    if kinds:
        blocks.append(Table("Planned bytes on the fullest rank, by kind", ("kind", "bytes"), kinds, folded=True))
        blocks.append(Table("Planned bytes, by moment of a step", ("moment", "bytes"), moments, folded=True))
    if ranks:
        names = list(dict.fromkeys(name for rank in ranks for name in rank if name != "rank"))
        lines = [[str(rank.get("rank", "")), *(bytes_of(rank, name) for name in names)] for rank in ranks]
        blocks.append(Table("Measured on each rank", ("rank", *map(words, names)), lines, folded=len(ranks) > 8))
    return blocks


def _bytes(counts: Any) -> list[tuple[str, str]]:
    return [(words(name), bytes_of(mapping(counts), name)) for name in mapping(counts) if number(counts, name)]


def phases(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return where the time of a step went, if it was profiled."""
    blocks: list[Block] = []
    for rank in mappings(mapping(run.summary.get("profile")).get("ranks")):
        spent = mapping(rank.get("phases"))
        seconds = {name: s for name in PHASES if (s := number(spent, name)) is not None}
        step = number(rank, "step_seconds") or sum(seconds.values()) or 1.0
        rows = [[name, PHASES[name], f"{s:.4f}", f"{100 * s / step:.1f} %"] for name, s in seconds.items()]
        if not rows:
            continue
        title = f"Seconds of a step on rank {rank.get('rank', '?')}"
        longest = max(seconds, key=lambda name: seconds[name])
        summary = f"{title}: {figure(step)} s, most of it {longest} ({100 * seconds[longest] / step:.0f} %)."
        svg = artist.bars(seconds, "s", f"{prefix}-{len(blocks)}", summary)
        blocks.append(Picture(title, summary, svg, Table(title, ("phase", "what", "seconds", "share"), rows)))
    if not blocks:
        blocks.append(Note("The steps were not profiled; debug=profile records where their time goes."))
    rows = []
    if (loading := number(run.summary or run.start, "load_seconds")) is not None:
        rows.append(("loading and quantizing the base", duration_of(loading)))
    steps = [s for line in run.metrics.steps if (s := number(line, "step_seconds")) is not None]
    if steps:
        rows.append(("a step, on average", f"{figure(sum(steps) / len(steps))} s"))
        rows.append(("the slowest step logged", f"{figure(max(steps))} s"))
    stalls = [s for line in run.metrics.events if (s := number(line, "checkpoint_stall_seconds")) is not None]
    if stalls:
        rows.append(("paused for checkpoints", f"{figure(sum(stalls))} s in {len(stalls)} pauses"))
    return [*blocks, Table("Time", ("what", "time"), rows)] if rows else blocks


def data(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return where the rows came from, what became of them, how long they are, and what of them is learned."""
    told = mapping(run.start.get("data"))
    train, held = mapping(told.get("training_rows")), mapping(told.get("held_out_rows"))
    rows = [[words(name), count_of(train, name), count_of(held, name)] for name in train]
    blocks: list[Block] = []
    sources = [("training data", told.get("train", run.settings("data").get("train")))]
    sources += [
        ("held-out data", told.get("eval") or run.settings("data").get("eval") or "a part of the training data")
    ]
    blocks.append(Table("Sources", ("what", "where"), [row for name, value in sources for row in rows_of(value, name)]))
    if rows:
        blocks.append(Table("Rows and tokens", ("what", "training", "held out"), rows))
        tokens, targets = number(train, "tokens"), number(train, "target_tokens")
        if tokens and targets is not None:
            blocks.append(Note(f"{100 * targets / tokens:.1f} % of the training tokens are learned."))
    blocks += _lengths(mapping(told.get("lengths")), prefix, run.settings("data").get("max_length"), artist)
    blocks += [
        Sample(f"Training row {at}, as the model sees it", [(cut(part.get("text", "")), part.get("learned") is True)
                                                            for part in mappings(sample)])
        for at, sample in enumerate(run.samples, 1)
    ]  # fmt: skip
    return blocks


def _lengths(lengths: dict[str, Any], prefix: str, most: Any, artist: Artist) -> list[Block]:
    bars = mapping(lengths.get("histogram"))
    edges, counts = bars.get("edges"), bars.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return []
    if not all(isinstance(value, int) for value in (*edges, *counts)):
        return []
    summary = (
        f"Lengths of the training rows in tokens: median {count_of(lengths, 'median')}, 95 % up to "
        f"{count_of(lengths, 'longer_than_95_percent')}, longest {count_of(lengths, 'longest')}; data.max_length is "
        f"{most}."
    )
    rows = [[f"{a} to {b - 1}", f"{n:,}"] for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    svg = artist.histogram(edges, counts, "tokens", prefix, summary)
    return [Picture("Lengths", summary, svg, Table("Rows by length", ("tokens", "rows"), rows, folded=True))]


def choices(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return what was chosen for settings left at ``auto``, and why."""
    chosen = mapping(run.start.get("auto")) or mapping(run.summary.get("auto"))
    rows = [
        [cut(key), cut(mapping(value).get("value", value)), cut(mapping(value).get("why", ""))]
        for key, value in chosen.items()
    ]
    return [Table("Chosen by the plan and the device", ("setting", "choice", "why"), rows)] if rows else []


def settings(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return the resolved settings, those that differ from the defaults first."""
    if not run.config:
        return []
    every = settings_of(run)
    changed = [[each.key, cut(each.value), cut(each.default)] for each in every if each.differs]
    return [
        Table("What differs from the defaults", ("setting", "value", "default"), changed),
        Table("All settings", ("setting", "value"), [[each.key, cut(each.value)] for each in every], folded=True),
    ]


def versions(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return the versions of Python and the packages."""
    rows = rows_of(run.versions)
    return [Table("Versions", ("package", "version"), rows)] if run.versions else []


def repeat(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return the commands that repeat the run, extend it, and use its result."""
    folder = run.folder
    blocks: list[Block] = [
        Note(
            "The settings, seed included, are in config.yaml. The same number of ranks and threads on the same "
            "versions gives the same losses bit for bit; other numbers of ranks give them within rounding."
        )
    ]
    world = number(run.start, "world_size")
    ranks = [] if world is None else [f"launcher.nproc_per_node={world:.0f}"]
    again = ["fsdp-qlora", "train", f"run_from={folder / 'config.yaml'}", f"run.name={run.name}_again", *ranks]
    blocks.append(Code("Train again", shlex.join(again)))
    if not run.finished:
        go_on = ["fsdp-qlora", "train", f"run_from={folder / 'config.yaml'}", "checkpoint.resume=auto", *ranks]
        blocks.append(Code("Go on from the last checkpoint", shlex.join(go_on)))
    if (folder / "adapter").is_dir():
        ask = [
            "fsdp-qlora",
            "generate",
            f"run_from={folder / 'config.yaml'}",
            f"adapter={folder / 'adapter'}",
            "prompt=...",
        ]
        blocks.append(Code("Ask the result", shlex.join(ask)))
    return blocks
