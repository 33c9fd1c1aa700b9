"""Records some steps with torch's profiler and reports where their time went: `debug=profile`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule, supported_activities

from fsdp_qlora.errors import StorageError
from fsdp_qlora.profile.phases import PHASES, WAITING, divide_steps
from fsdp_qlora.profile.trace import read_trace
from fsdp_qlora.scopes import STEP

_SECOND = 1e9


class StepProfiler:
    """Records steps of one rank into ``<folder>/rank<r>.json.gz``, which Perfetto and chrome://tracing open.

    The first ``warmup_steps`` steps run with the profiler on but are discarded: they include its startup.
    """

    def __init__(
        self, folder: Path, rank: int, device: torch.device, warmup_steps: int, record_steps: int,
        scoped: Callable[[], AbstractContextManager[object]],
    ) -> None:  # fmt: skip
        """Record ``record_steps`` steps after ``warmup_steps``; ``scoped`` is the context that adds module scopes."""
        self.file, self._device = folder / f"rank{rank}.json.gz", device
        self._rank, self._first, self._last = rank, warmup_steps, warmup_steps + record_steps
        self._scoped, self._stack = scoped, ExitStack()
        self._profile: profile | None = None
        self._taken = 0
        self._failure: str | None = None
        self.steps: list[int] = []
        """Numbers of the recorded steps."""
        self._seconds: list[float] = []
        self._clear(folder)

    def _clear(self, folder: Path) -> None:
        """Remove this rank's trace from an earlier start; rank 0 removes all ranks' traces, even of ranks now gone."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank*.json.gz") if self._rank == 0 else [self.file]:
            old.unlink(missing_ok=True)

    @contextmanager
    def around_step(self, number: int) -> Iterator[None]:
        """Record a step, if it is one of those to record."""
        if self._taken >= self._last:
            yield
            return
        if self._profile is None:
            self._profile = self._start()
        started = time.perf_counter()
        with record_function(STEP):
            yield
            if self._device.type != "cpu":  # the update is still queued, and belongs to this step
                torch.accelerator.synchronize(self._device)
        if self._taken >= self._first:
            self.steps.append(number)
            self._seconds.append(time.perf_counter() - started)
        self._taken += 1
        self._profile.step()
        if self._taken == self._last:
            self.close()

    def _start(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports each start and stop on stderr
        kinds = {ProfilerActivity.CPU} | (supported_activities() if self._device.type != "cpu" else set())
        self._stack.enter_context(self._scoped())
        started = profile(
            activities=kinds, on_trace_ready=self._write,
            schedule=schedule(wait=0, warmup=self._first, active=self._last - self._first, repeat=1),
        )  # fmt: skip
        started.start()
        return started

    def _write(self, finished: profile) -> None:
        try:
            finished.export_chrome_trace(str(self.file))
        except OSError as error:  # raised later on every rank; raising here would deadlock the others
            self._failure = f"{self.file} cannot be written: {error.strerror}."

    def close(self) -> None:
        """Write what was recorded and stop recording."""
        if self._profile is not None:
            self._profile.stop()
        self._profile, self._taken = None, self._last
        self._stack.close()

    def result(self) -> dict[str, Any] | None:
        """Return this rank's mean recorded step, in seconds; None if no step was recorded.

        Raises:
            StorageError: if the trace could not be written.
        """
        if self._failure is not None:
            raise StorageError(self._failure)
        if not self.steps:
            return None
        steps = divide_steps(read_trace(self.file))
        count = len(steps) * _SECOND
        mean = {phase: sum(step.phases[phase] for step in steps) / count for phase in PHASES}
        waited = sum(step.waited for step in steps) / count
        return {
            "rank": self._rank,
            "steps": self.steps,
            "step_seconds": sum(step.total for step in steps) / count,
            "measured_step_seconds": sum(self._seconds) / len(self._seconds),
            "phases": mean,
            "waiting": {"in_collectives": waited, "elsewhere": mean[WAITING] - waited},
            "collectives_under_way": sum(step.under_way for step in steps) / count,
            "trace": self.file.name,
        }
