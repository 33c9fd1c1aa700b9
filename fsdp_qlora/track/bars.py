"""How far long work is: a bar on a terminal, a line now and then elsewhere. Nothing else in the package draws bars.

Off until a program that talks to a user calls `show_bars`: as a library, the package draws nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fsdp_qlora.shown import visible

_T = TypeVar("_T")
Tell = Callable[[int, int], None]
"""Is told how many of how many are done; of 0 if nobody knows how many there are."""
LINE_SECONDS = 30.0
"""Time between two lines where there is no terminal; what is done sooner says nothing."""


class _SteadyConsole(Console):
    """A console that leaves the cursor where it can be seen: a process may end without a chance to show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def console(**settings: Any) -> Console:
    """Return a console that prints text verbatim: ``[INST]`` is not markup and ``:ok:`` not an emoji."""
    return _SteadyConsole(highlight=False, markup=False, emoji=False, **settings)


class Screen:
    """The terminal, of which all bars of a process share one block of lines; nothing where there is none."""

    def __init__(self) -> None:
        self.shown = False
        self._progress: Progress | None = None
        self._open = 0

    def add(self, doing: str, total: int, done: int = 0) -> TaskID | None:
        """Add a bar; return None where there is no terminal. ``total`` is 0 if it is not known."""
        if not (sys.stdout.isatty() or sys.stderr.isatty()):
            return None
        if self._progress is None:
            on = sys.stdout.isatty()
            self._progress = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(),
                TextColumn("{task.fields[values]}", markup=False), TimeRemainingColumn(),
                console=console(stderr=not on), redirect_stdout=on, redirect_stderr=on, speed_estimate_period=300,
            )  # fmt: skip
            self._progress.start()
        self._open += 1
        return self._progress.add_task(visible(doing), total=total or None, completed=done, values="")

    def update(self, bar: TaskID, **values: Any) -> None:
        """Change what a bar shows."""
        if self._progress is not None:
            self._progress.update(bar, **values)

    def print(self, text: str) -> None:
        """Print a line above the bars."""
        if self._progress is not None:
            self._progress.print(visible(text))

    def remove(self, bar: TaskID, keep: bool) -> None:
        """End a bar: ``keep`` leaves it on the screen."""
        if self._progress is None:
            return
        if not keep:
            self._progress.remove_task(bar)
        self._open -= 1
        if not self._open:
            self._progress.stop()
            self._progress = None


SCREEN = Screen()


def show_bars() -> None:
    """Show bars from now on."""
    SCREEN.shown = True


class Bar:
    """One bar. Called with how many are done and how many there are; done when they are equal, or at `close`."""

    def __init__(
        self, doing: str, screen: Screen = SCREEN, keep: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Say what is done, ``loading``; ``keep`` leaves a finished bar on the screen."""
        self._doing, self._screen, self._keep, self._clock = doing, screen, keep, clock
        self._bar: TaskID | None = None
        self._begun: tuple[float, int] | None = None
        self._said = 0.0
        self._closed = not screen.shown

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done; of 0 if nobody knows how many there are."""
        if self._closed:
            return
        now = self._clock()
        if self._begun is None:
            self._begun, self._said = (now, done), now
            self._bar = self._screen.add(self._doing, total, done)
        if self._bar is not None:
            self._screen.update(self._bar, completed=done, total=total or None)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            of = f"/{total}" if total else ""
            print(visible(f"{self._doing} {done}{of}{self.left(done, total)}"), file=sys.stderr, flush=True)
        if total and done >= total:
            self.close()

    def left(self, done: int, total: int) -> str:
        """Return the time left at the speed since the first call, as text; nothing if it cannot be told."""
        started, first = self._begun or (0.0, 0)
        if not total or done <= first or done >= total:
            return ""
        return f", {clock((self._clock() - started) / (done - first) * (total - done))} left"

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._screen.remove(self._bar, self._keep)
        self._bar, self._closed = None, True


def counted(items: Iterable[_T], doing: str, total: int, shown: bool) -> Iterator[_T]:
    """Yield the items and show on a bar, which goes away at the end, how many have been dealt with."""
    bar = Bar(doing, keep=False) if shown else None
    try:
        for number, item in enumerate(items):
            if bar is not None:
                bar(number, total)
            yield item
    finally:
        if bar is not None:
            bar.close()


def clock(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss."""
    whole = int(seconds)
    hours, minutes = whole // 3600, f"{whole // 60 % 60}:{whole % 60:02d}"
    return f"{hours}:{minutes.zfill(5)}" if hours else minutes
