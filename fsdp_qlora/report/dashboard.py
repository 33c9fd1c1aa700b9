"""What `watch` draws: a frame for a terminal that can redraw, a line for one that cannot."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fsdp_qlora.report.charts import chart, sparkline
from fsdp_qlora.report.curves import Points
from fsdp_qlora.report.metrics import Line, mapping, mappings, number
from fsdp_qlora.report.numbers import bytes_of, duration_of, figure, figure_of
from fsdp_qlora.report.progress import Progress, progress_of, rank_states
from fsdp_qlora.report.record import Run
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import describe, megabytes

_MESSAGES, _RANKS = 5, 8
"""Messages and ranks in a frame."""
_SMALLEST, _LARGEST = 6, 12
"""Lines of a chart."""


def frame(run: Run, now: float, width: int, height: int) -> RenderableType:
    """Return the dashboard of a run for a terminal of ``width`` x ``height`` characters."""
    progress, said = progress_of(run, now), messages(run, width)
    lines = run.metrics.steps
    ranks = _ranks(run, progress, now)
    left = height - 9 - min(_MESSAGES, len(said)) - (0 if ranks is None else ranks.row_count + 5)
    parts: list[RenderableType] = [_title(run, progress), _bar(progress, width), _figures(run)]
    if lines:
        wide = width if width < 90 else (width - 2) // 2
        tall = max(_SMALLEST, min(_LARGEST, left))
        charts = [chart("loss (o: held out)", _points(lines, "loss"), wide, tall,
                        _points(run.metrics.evaluations, "eval_loss"))]  # fmt: skip
        if width >= 90:
            charts.append(chart("tokens/s", _points(lines, "tokens_per_second"), wide, tall))
        parts.append(Columns(charts, padding=(0, 2, 0, 0)) if len(charts) > 1 else charts[0])
    if ranks is not None:
        parts.append(ranks)
    parts += [Text(text, style="yellow" if bad else "dim", no_wrap=True, overflow="ellipsis") for text, bad in said]
    if progress.runs:
        parts.append(Text("Ctrl-C leaves this view; the run goes on.", style="dim"))
    return Group(*parts)


def sweep(runs: Sequence[Run], now: float, width: int) -> RenderableType:
    """Return the dashboard of several runs: a line for each."""
    table = Table(title=f"{len(runs)} runs", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=8)
    for name in ("state", "steps", "loss", "held out", "tokens/s", "left"):
        table.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
    wide = max(0, min(24, width - 84))
    if wide >= 8:
        table.add_column("curve", no_wrap=True)
    for run in runs:
        progress = progress_of(run, now)
        newest = run.metrics.steps[-1] if run.metrics.steps else {}
        held = run.metrics.evaluations[-1] if run.metrics.evaluations else {}
        cells = [run.name, progress.state, _steps(progress), figure_of(newest, "loss"), figure_of(held, "eval_loss"),
                 figure_of(newest, "tokens_per_second"), _left(progress)]  # fmt: skip
        if wide >= 8:
            cells.append(sparkline([value for _, value in _points(run.metrics.steps, "loss")], wide))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def line(run: Run, now: float) -> str:
    """Return how far a run is, as one line of text."""
    progress = progress_of(run, now)
    parts = [f"{run.name}: {progress.state}", f"step {_steps(progress)}"]
    if run.metrics.steps:
        newest = run.metrics.steps[-1]
        parts += [f"loss {figure_of(newest, 'loss')}", f"{figure_of(newest, 'tokens_per_second')} tokens/s",
                  bytes_of(newest, "peak_memory_bytes")]  # fmt: skip
    if run.metrics.evaluations:
        parts.append(f"held-out loss {figure_of(run.metrics.evaluations[-1], 'eval_loss')}")
    if progress.left is not None:
        parts.append(f"{duration_of(progress.left)} left")
    if progress.runs and run.ranks and (states := rank_states(run)):
        slowest = max(states, key=lambda state: state[3] or 0.0)
        if (slowest[3] or 0.0) > 5.0:
            parts.append(f"rank {slowest[0]} silent for {slowest[3]:.0f} s in {slowest[1]}")
    if run.ending is not None and run.ending["message"]:
        parts.append(run.ending["message"].splitlines()[0])
    return visible(", ".join(parts))


def messages(run: Run, width: int) -> list[tuple[str, bool]]:
    """Return the last messages of a run, oldest first, and whether each is a warning."""
    dated: list[tuple[float, str, bool]] = []
    for each in (*run.metrics.evaluations, *run.metrics.events):
        if (text := _told(each)) is not None:
            dated.append((number(each, "time") or 0.0, f"step {each['step']}: {text}", "bad_step" in each))
    dated += [(number(each, "time") or 0.0, str(each.get("message", "")), True) for each in mappings(run.messages)]
    if run.ending is not None and run.ending["message"]:
        dated.append((run.ending["time"], f"rank {run.ending['rank']}: {run.ending['message']}", True))
    newest = sorted(dated, key=lambda each: each[0])[-_MESSAGES:]
    shown = [(f"{time.strftime('%H:%M:%S', time.localtime(_safe(at)))} {text}", bad) for at, text, bad in newest]
    shown += [(remark, True) for remark in run.remarks[:2] if run.metrics.last_time is not None]
    return [(visible(text.replace("\n", " "))[: 4 * width], bad) for text, bad in shown]


def _safe(at: float) -> float:
    return at if 0 <= at < 1e11 else 0.0


def _told(each: Line) -> str | None:
    try:
        return describe({name: value for name, value in each.items() if name not in ("time", "step")})
    except (KeyError, TypeError, ValueError):  # a line of another version, or damaged
        return None


def _title(run: Run, progress: Progress) -> Text:
    style = "green" if progress.state in ("running", "finished") else "bold red"
    model = run.settings("model").get("name")
    title = Text(visible(run.name), style="bold")
    title.append(f"  {visible(progress.state)}", style=style)
    if isinstance(model, str) and model:
        title.append(f"  {visible(model.rstrip('/').rpartition('/')[2])}", style="dim")
    return title


def _bar(progress: Progress, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    times = f"{duration_of(progress.elapsed)} so far, {_left(progress)} left" if progress.runs else (
        f"took {duration_of(progress.elapsed)}")  # fmt: skip
    cells: list[RenderableType] = [Text(f"step {_steps(progress)}"), Text(times)]
    if progress.total:
        bar = ProgressBar(total=progress.total, completed=min(progress.step, progress.total), width=min(30, width // 3))
        cells.insert(0, bar)
    grid.add_row(*cells)
    return grid


def _figures(run: Run) -> RenderableType:
    newest = run.metrics.steps[-1] if run.metrics.steps else {}
    held = [loss for each in run.metrics.evaluations if (loss := number(each, "eval_loss")) is not None]
    planned = number(mapping(run.start.get("plan")), "peak_planned_bytes")
    if planned is not None and run.start.get("device") == "cpu":  # what is measured there is the whole process
        planned += number(run.start, "process_bytes") or 0.0
    memory = bytes_of(newest, "peak_memory_bytes")
    if planned is not None:
        memory += f" (planned {megabytes(planned)})"
    rows = [
        ("loss", figure_of(newest, "loss"), "gradient norm", figure_of(newest, "grad_norm")),
        ("held out", f"{figure(held[0])} -> {figure(held[-1])}, best {figure(min(held))}" if held else "not measured",
         "learning rate", figure_of(newest, "lr")),
        ("peak memory", memory, "tokens/s", figure_of(newest, "tokens_per_second")),
    ]  # fmt: skip
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value, other, others in rows:
        grid.add_row(Text(name, style="dim"), Text(value), Text(other, style="dim"), Text(others))
    return grid


def _ranks(run: Run, progress: Progress, now: float) -> Table | None:
    """Return what the ranks are doing, those that have been silent longest first; None if that is not recorded."""
    states = rank_states(run)
    if run.finished or not states:
        return None
    told = number(run.ranks, "time")
    age = "" if told is None else f" ({max(0.0, now - told):.0f} s ago)"
    table = Table(
        title=f"{'ranks' if progress.runs else 'the ranks before the end'}{age}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("rank", "doing", "for", "silent"):
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    chosen = sorted(states, key=lambda state: -(state[3] or 0.0))[:_RANKS]
    for rank, doing, since, silent in sorted(chosen, key=lambda state: int(state[0]) if state[0].isdigit() else 0):
        spent = None if since is None or told is None else max(0.0, told - since)
        quiet = "" if silent is None or silent < 5.0 else f"{silent:.0f} s"
        table.add_row(Text(visible(rank)), Text(visible(doing)), duration_of(spent), quiet)
    if len(states) > _RANKS:
        table.add_row("...", f"and {len(states) - _RANKS} more", "", "")
    return table


def _points(lines: Sequence[Line], key: str) -> Points:
    return [(each["step"], value) for each in lines if (value := number(each, key)) is not None] or [(0, 0.0)]


def _steps(progress: Progress) -> str:
    return f"{progress.step}/{progress.total}" if progress.total else str(progress.step)


def _left(progress: Progress) -> str:
    return "" if not progress.runs else "?" if progress.left is None else duration_of(progress.left)
