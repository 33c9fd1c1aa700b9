"""The curves of one or several runs, from the lines of their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fsdp_qlora.report.metrics import Line, number
from fsdp_qlora.report.record import Run

_LOSS = "eval_loss"
Points = list[tuple[float, float]]
"""Step and value."""


@dataclass(frozen=True)
class Series:
    """One line of a picture."""

    label: str
    points: Points
    colour: int
    """Index into the page's colours."""
    held_out: bool = False
    """Whether it is drawn with dots: few points, from evaluations."""


@dataclass(frozen=True)
class Curve:
    """One picture."""

    key: str
    title: str
    unit: str
    """Unit of the values; empty for numbers."""
    series: tuple[Series, ...]

    def thinned(self, most: int) -> Curve:
        """Return the curve with about ``most`` points in each series, the extremes among them."""
        return replace(self, series=tuple(replace(each, points=thin(each.points, most)) for each in self.series))


def thin(points: Points, most: int) -> Points:
    """Return the lowest and the highest point of each of ``most`` / 2 stretches, the first point and the last."""
    if len(points) <= most:
        return points
    stretch = max(1, 2 * len(points) // most)
    kept = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += sorted({low, high})
    return [*kept, points[-1]]


def curves(runs: Sequence[Run], labels: Sequence[str]) -> list[Curve]:
    """Return the curves for which any run has values."""
    several = len(runs) > 1

    def of(label: str, what: str) -> str:
        return f"{label}: {what}" if several else what

    loss = [
        series
        for colour, (run, label) in enumerate(zip(runs, labels, strict=True))
        for series in (
            Series(of(label, "training"), _points(run.metrics.steps, "loss"), colour),
            Series(of(label, "held out"), _points(run.metrics.evaluations, _LOSS), colour, held_out=True),
        )
    ]
    drawn = [Curve("loss", "Loss", "", tuple(loss))]
    if not several:
        drawn.append(Curve("sources", "Held-out loss by source", "", tuple(_by_source(runs[0]))))
    for key, title, unit, scale in _OF_STEPS:
        series = [
            Series(label, [(step, value * scale) for step, value in _points(run.metrics.steps, key)], colour)
            for colour, (run, label) in enumerate(zip(runs, labels, strict=True))
        ]
        drawn.append(Curve(key, title, unit, tuple(series)))
    drawn += _measured(runs, labels)
    shown = [replace(curve, series=tuple(each for each in curve.series if each.points)) for curve in drawn]
    return [curve for curve in shown if curve.series]


_OF_STEPS = (
    ("lr", "Learning rate", "", 1.0),
    ("grad_norm", "Gradient norm", "", 1.0),
    ("tokens_per_second", "Throughput", "tokens/s", 1.0),
    ("step_seconds", "Time of a step", "s", 1.0),
    ("peak_memory_bytes", "Peak memory of rank 0", "GB", 1e-9),
    ("mfu", "Model FLOPs utilization", "%", 100.0),
)
"""Values of training lines: name there, title, unit, factor to that unit."""


def _measured(runs: Sequence[Run], labels: Sequence[str]) -> list[Curve]:
    """Return a curve for each other number of the evaluations."""
    names = dict.fromkeys(
        name
        for run in runs
        for line in run.metrics.evaluations
        for name in line
        if name.startswith("eval_") and name != _LOSS and number(line, name) is not None
    )
    return [
        Curve(
            name, f"Held out: {name.removeprefix('eval_')}", "",
            tuple(Series(label, _points(run.metrics.evaluations, name), colour, held_out=True)
                  for colour, (run, label) in enumerate(zip(runs, labels, strict=True))),
        )
        for name in names
    ]  # fmt: skip


def _points(lines: Sequence[Line], key: str) -> Points:
    return _chosen(lines, lambda line: number(line, key))


def _chosen(lines: Sequence[Line], value: Callable[[Line], float | None]) -> Points:
    points = {line["step"]: chosen for line in lines if (chosen := value(line)) is not None}
    return sorted(points.items())  # of a step that was run twice, the second time


def _by_source(run: Run) -> list[Series]:
    def split(line: Line) -> dict[str, float]:
        losses = line.get("eval_loss_by_source")
        return losses if isinstance(losses, dict) else {}

    names = dict.fromkeys(name for line in run.metrics.evaluations for name in split(line))
    return [
        Series(name, _chosen(run.metrics.evaluations, lambda line, name=name: number(split(line), name)), colour, True)
        for colour, name in enumerate(names)
    ]
