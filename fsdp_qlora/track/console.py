"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from fsdp_qlora.shown import visible
from fsdp_qlora.track.bars import SCREEN, Screen, clock, console
from fsdp_qlora.track.sink import Sink


class ConsoleProgress(Sink):
    """Shows loss, tokens per second, memory and time left."""

    def __init__(self, total_steps: int, start_step: int = 0, screen: Screen = SCREEN) -> None:
        self.console = console()
        self._total, self._started, self._first = total_steps, time.monotonic(), start_step
        self._screen = screen
        # Not on stderr alone: the lines of a run that is written to a file are its log.
        self._bar = screen.add("step", total_steps, start_step) if sys.stdout.isatty() else None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Show a step's values."""
        text = describe(values)
        if self._bar is None:
            left = self._left(step) if "loss" in values else ""
            print(visible(f"step {step}/{self._total} {text}{left}"), flush=True)
        elif "loss" not in values:
            self._screen.print(f"step {step}/{self._total} {text}")
        else:
            self._screen.update(self._bar, completed=step, values=brief(values))

    def rewind(self, step: int) -> None:
        """Do nothing: the next line shows the current step."""

    def _left(self, step: int) -> str:
        done = step - self._first
        if done <= 0 or step >= self._total:
            return ""
        return f", {clock((time.monotonic() - self._started) / done * (self._total - step))} left"

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._screen.remove(self._bar, keep=True)
        self._bar = None


def describe(values: dict[str, Any]) -> str:
    """Return the values worth showing, as one line."""
    if "bad_step" in values:
        first, after = values["left_out"]
        return f"after bad step {values['bad_step']}: rows at {first}..{after - 1} are skipped. {values['reason']}"
    if "checkpoint_stall_seconds" in values:
        return f"checkpoint started, training paused for {values['checkpoint_stall_seconds']:.3f} s"
    if "eval_loss" in values:
        metrics = {name.removeprefix("eval_"): value for name, value in values.items() if isinstance(value, float)}
        return f"eval loss {metrics.pop('loss'):.4f}" + "".join(f", {n} {v:.2f}" for n, v in metrics.items())
    return (
        f"loss {values['loss']:.4f}, grad norm {values['grad_norm']:.3f}, lr {values['lr']:.2e}, "
        f"{values['tokens_per_second']:.0f} tok/s, {megabytes(values['peak_memory_bytes'])}"
    )


def brief(values: dict[str, Any]) -> str:
    """Return the values that fit next to the bar in 80 columns."""
    speed, memory = values["tokens_per_second"], megabytes(values["peak_memory_bytes"])
    return f"loss {values['loss']:.4f}  {speed:.0f} tok/s  {memory}"


def megabytes(count: float) -> str:
    """Return bytes as a short text in powers of 1000."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count and count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count else "0 MB"


def duration(seconds: float) -> str:
    """Return a duration with two or three digits: ``123 s``, ``12.3 s``, ``0.12 s``, ``12 ms``, ``1.2 ms``."""
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
