"""The sections of the page about results: what came out, and the curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fsdp_qlora.report.blocks import Block, Dialogue, Heading, Key, Note, Picture, Section, Table, cut
from fsdp_qlora.report.curves import Curve, Points, Series, curves
from fsdp_qlora.report.metrics import mappings, number
from fsdp_qlora.report.numbers import NOT_KNOWN, bytes_of, count_of, duration_of, figure, figure_of, moment, rows_of
from fsdp_qlora.report.pictures import INSTALL, Artist
from fsdp_qlora.report.record import Run
from fsdp_qlora.report.settings import differing

_SHOWN_STEPS = 16
"""Rows of a curve's table."""


def each_run(
    key: str, title: str, runs: Sequence[Run], labels: Sequence[str], artist: Artist,
    of: Callable[[Run, str, Artist], list[Block]],
) -> Section:  # fmt: skip
    """Return a section with the blocks of each run, under the run's name if there are several.

    ``of`` receives a run and a prefix for the names of its pictures, which are unique in the page.
    """
    blocks: list[Block] = []
    for at, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if len(runs) > 1:
            blocks.append(Heading(label))
        blocks += of(run, f"{key}{at}", artist) or [Note("Nothing of this is recorded in the run's folder.")]
    return Section(key, title, blocks)


def overview(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return how a run ended and its main figures."""
    summary, metrics = run.summary, run.metrics
    steps = f"{metrics.last_step} of {run.total_steps}" if run.total_steps else f"{metrics.last_step}"
    begun = number(run.start, "time")
    rows = [("state", run.state), ("steps", steps)]
    if begun is not None:
        last = number(run.ending or {}, "time") or metrics.last_time
        rows += [("began", moment(begun)), ("took", duration_of(None if last is None else last - begun))]
    rows += _result(run)
    model = run.settings("model").get("name")
    rows += [
        ("model", cut(model or NOT_KNOWN)),
        ("device", cut(summary.get("device", run.start.get("device", NOT_KNOWN)))),
    ]
    blocks: list[Block] = [Table("The run", ("what", "value"), rows)]
    if run.ending is not None and run.ending["message"]:
        blocks.insert(0, Note(f"Rank {run.ending['rank']} reported: {cut(run.ending['message'])}", warning=True))
    blocks += [Note(cut(remark), warning=True) for remark in run.remarks]
    said = [(moment(number(each, "time")), cut(each.get("message", ""))) for each in mappings(run.messages)]
    if said:
        blocks.append(Table("Warnings", ("when", "message"), said[-50:]))
    if summary.get("verdict"):
        blocks.append(Table("Verdict", ("what", "value"), rows_of(summary["verdict"])))
    return blocks


def _result(run: Run) -> list[tuple[str, str]]:
    summary, evaluations = run.summary, run.metrics.evaluations
    rows = []
    if evaluations:
        losses = [(loss, line["step"]) for line in evaluations if (loss := number(line, "eval_loss")) is not None]
        if losses:
            best, step = min(losses)
            rows.append(("held-out loss", f"{figure(losses[0][0])} before, {figure(losses[-1][0])} at the end"))
            rows.append(("lowest held-out loss", f"{figure(best)} at step {step}"))
    if run.metrics.steps:
        first, last = run.metrics.steps[0], run.metrics.steps[-1]
        rows.append(("training loss", f"{figure_of(first, 'loss')} at first, {figure_of(last, 'loss')} at last"))
    if summary:
        rows += [
            ("speed", f"{figure_of(summary, 'tokens_per_second')} tokens/s"),
            ("tokens", f"{count_of(summary, 'tokens')}, {count_of(summary, 'target_tokens')} of them learned"),
            ("trainable parameters", count_of(summary, "trainable_parameters")),
            ("size of the result", bytes_of(summary, "adapter_bytes")),
        ]
    return rows


def comparison(runs: Sequence[Run], labels: Sequence[str]) -> Section:
    """Return the tables of several runs beside each other."""
    lines = [dict(_compared(run)) for run in runs]
    names = dict.fromkeys(name for line in lines for name in line)
    results = [[name, *(line.get(name, NOT_KNOWN) for line in lines)] for name in names]
    differences = [[key, *map(cut, values)] for key, values in differing(runs)]
    blocks: list[Block] = [Table("Results", ("what", *labels), results)]
    if differences:
        blocks.append(Table("What differs between the runs", ("setting or version", *labels), differences))
    else:
        blocks.append(Note("All settings and versions of these runs are equal."))
    return Section("comparison", "Comparison", blocks)


def _compared(run: Run) -> list[tuple[str, str]]:
    measured = [number(rank, "peak_memory_bytes") for rank in mappings(run.summary.get("ranks"))]
    peak = max((count for count in measured if count is not None), default=None)
    return [
        ("state", run.state),
        ("steps", f"{run.metrics.last_step:,}"),
        *_result(run),
        ("highest peak memory", bytes_of({"peak": peak}, "peak")),
    ]


def curve_section(runs: Sequence[Run], labels: Sequence[str], artist: Artist, most: int) -> Section:
    """Return the pictures of all curves, with about ``most`` points in each line."""
    blocks: list[Block] = []
    for curve in curves(runs, labels):
        thinned = curve.thinned(most)
        summary = f"{curve.title}. " + " ".join(
            _told(series, curve.unit, len(curve.series) > 1) for series in curve.series
        )
        legend = [Key(cut(s.label), s.colour, s.held_out) for s in curve.series] if len(curve.series) > 1 else []
        drawn = artist.curve(thinned, f"curve-{len(blocks)}", summary)
        blocks.append(Picture(curve.title + (f" ({curve.unit})" if curve.unit else ""), summary, drawn,
                              _values(curve), legend))  # fmt: skip
    if not blocks:
        return Section("curves", "Curves", [Note("No step has been logged, so there are no curves.")])
    if not artist.draws:
        blocks.insert(0, Note(f"The values are in tables: {INSTALL} adds pictures.", warning=True))
    return Section("curves", "Curves", blocks)


def _told(series: Series, unit: str, several: bool) -> str:
    """Return what a line shows, in words."""
    points = series.points
    (first, before), (last, after) = points[0], points[-1]
    low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    of, who = f" {unit}" if unit else "", f"{cut(series.label)}: " if several else ""
    if len(points) == 1:
        return f"{who}{figure(after)}{of} at step {last}."
    return (
        f"{who}{figure(before)}{of} at step {first}, {figure(after)} at step {last}; lowest {figure(low[1])} at step "
        f"{low[0]}, highest {figure(high[1])} at step {high[0]}."
    )


def _values(curve: Curve) -> Table:
    """Return some steps of a curve as a table, the first and the last among them."""
    steps = sorted({step for series in curve.series for step, _ in series.points})
    stride = max(1, -(-len(steps) // _SHOWN_STEPS))
    shown = sorted({*steps[::stride], steps[-1], *(_lowest(series.points) for series in curve.series)})
    values = [dict(series.points) for series in curve.series]
    rows = [[str(step), *(figure(line[step]) if step in line else "" for line in values)] for step in shown]
    return Table(f"Values of {curve.title.lower()}", ("step", *(cut(s.label) for s in curve.series)), rows, folded=True)


def _lowest(points: Points) -> float:
    return min(points, key=lambda point: point[1])[0]


def answers(run: Run, prefix: str, artist: Artist) -> list[Block]:
    """Return the answers to the sample prompts before and after training, and at evaluations."""
    blocks: list[Block] = []
    for sample in mappings(run.summary.get("samples")):
        others = [(str(who), cut(text)) for who, text in sample.items() if who != "prompt" and text is not None]
        blocks.append(Dialogue(cut(sample.get("prompt", "")), others))
    rows = [[cut(value) for value in line.values()] for line in mappings(run.answers)]
    if rows:
        header = list(mappings(run.answers)[0])
        blocks.append(Table("Answers at evaluations", header, [r for r in rows if len(r) == len(header)], folded=True))
    if not blocks:
        blocks.append(Note("No prompt was answered; train.sample_prompts=[...] names some."))
    return blocks
