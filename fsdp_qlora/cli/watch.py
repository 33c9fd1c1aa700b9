"""`watch RUN`: follows a run, or the runs of a sweep, in the terminal until they have ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.live import Live

from fsdp_qlora.distributed.signals import give_back_signals, take_signals
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.report.dashboard import frame, line, sweep
from fsdp_qlora.report.metrics import MetricsFile
from fsdp_qlora.report.progress import progress_of
from fsdp_qlora.report.record import Run, is_run, read_run, run_folders
from fsdp_qlora.track.console import console

USAGE = """usage: fsdp-qlora watch RUN [every=SECONDS] [once=true]

Follows a run until it has ended: curves, progress, time left, rates, memory, what each rank is doing, last messages.
For a folder of several runs, such as a sweep, one line each. Where the terminal cannot redraw (TERM=dumb, a pipe),
prints a line now and then. Only reads; Ctrl-C leaves, and the run goes on.

  RUN            a run's folder, or that of a sweep
  every=SECONDS  between two looks; by default 1, and 15 where it prints lines
  once=true      look once"""
_LIVE_SECONDS, _LINE_SECONDS = 1.0, 15.0


@dataclass
class _Followed:
    """The runs of a folder, with what has been read of their metrics."""

    path: str
    files: dict[Path, MetricsFile] = field(default_factory=dict)

    def look(self) -> list[Run]:
        """Return the runs as they are now; a sweep may have started another one."""
        runs = []
        for folder in run_folders([self.path], "watch"):
            file = self.files.setdefault(folder, MetricsFile(folder / "metrics.jsonl"))
            runs.append(read_run(folder, file))
        return runs


def run(arguments: list[str]) -> int:
    """Follow; return the exit code, 0 however the run ends."""
    path, every, once = _parsed(arguments)
    followed = _Followed(path)
    followed.look()  # a folder that is no run is refused before anything is drawn
    screen = console(force_terminal=False if os.environ.get("TERM", "dumb") in ("dumb", "unknown") else None)
    before = take_signals((signal.SIGTERM, signal.SIGHUP), _leave)
    try:
        if screen.is_terminal and not once:
            _live(followed, screen, every or _LIVE_SECONDS)
        elif screen.is_terminal:
            screen.print(_drawn(followed, followed.look(), screen))
        else:
            _lines(followed, every or _LINE_SECONDS, once)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        give_back_signals(before)
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[str, float | None, bool]:
    paths, every, once = [], None, False
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key == "every":
            try:
                every = float(value)
            except ValueError:
                every = 0.0
            if not 0.1 <= every <= 86_400:
                raise ConfigError(f"watch: every={value} is not a number of seconds from 0.1 to 86400.")
        elif equals and key == "once":
            if value not in ("true", "false"):
                raise ConfigError(f"watch: once={value} is neither true nor false.")
            once = value == "true"
        elif word.startswith("-"):
            raise ConfigError(f"watch: there is no option {word}.\n{USAGE}")
        else:
            paths.append(word)
    if len(paths) != 1:
        raise ConfigError(f"watch: name the folder of one run, or that of a sweep.\n{USAGE}")
    return paths[0], every, once


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _single(followed: _Followed) -> bool:
    return is_run(Path(followed.path).expanduser())


def _drawn(followed: _Followed, runs: Sequence[Run], screen: Console) -> RenderableType:
    if _single(followed):
        return frame(runs[0], time.time(), screen.width, screen.height)
    return sweep(runs, time.time(), screen.width)


def _live(followed: _Followed, screen: Console, every: float) -> None:
    """Redraw until all runs have ended; the last frame stays on the screen."""
    runs = followed.look()
    with Live(_drawn(followed, runs, screen), console=screen, auto_refresh=False, vertical_overflow="crop") as live:
        while _any_runs(runs):
            time.sleep(every)
            runs = followed.look()
            live.update(_drawn(followed, runs, screen), refresh=True)


def _lines(followed: _Followed, every: float, once: bool) -> None:
    """Print a line for each run that has moved, until all have ended."""
    shown: dict[Path, tuple[int, str]] = {}
    while True:
        runs = followed.look()
        for each in runs:
            now = time.time()
            moved = (each.metrics.last_step, progress_of(each, now).state)
            if shown.get(each.folder) != moved:
                print(line(each, now), flush=True)
                shown[each.folder] = moved
        if once or not _any_runs(runs):
            return
        time.sleep(every)


def _any_runs(runs: Sequence[Run]) -> bool:
    now = time.time()
    return any(progress_of(each, now).runs for each in runs)
