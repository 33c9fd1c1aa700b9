"""The jobs of a sweep: each a training in a process, with ranks and a folder of its own. Imports no torch.

A job is a plain command line, `fsdp-qlora train ...`, which is printed and can be run alone. Its folder is named by its
overrides, so the same override finds the same folder again: a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.cli.launcher import PACKAGE
from fsdp_qlora.cli.quoting import command
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.distributed.parent import PARENT_VARIABLE
from fsdp_qlora.distributed.signals import STOP_SIGNALS, give_back_signals, take_signals
from fsdp_qlora.errors import STOPPED_EXIT_CODE, RunFolderError
from fsdp_qlora.files.read import open_regular, read_json
from fsdp_qlora.files.write import write_json
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible

RECORD = "sweep.json"
"""File in the sweep's folder: what became of each job."""
_LONGEST_NAME = 120
_PART_OF_A_SWEEP = {"checkpoint.resume": "auto"}
"""Settings of every job that are not typed: a sweep resumes its jobs, whatever an experiment says."""
_SAME = ("model", "data", "quant", "lora", "fsdp", "precision", "train", "optim", "schedule", "objective")
"""Groups in which a finished job must agree to be skipped; all others say where and how a job runs."""
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One combination."""

    choices: tuple[str, ...]
    """Its overrides, by key: ``lora.r=8``, ``optim.lr=1e-4``."""
    arguments: list[str]
    """Of `fsdp-qlora train`."""
    config: RunConfig

    @property
    def name(self) -> str:
        """The job's folder inside the sweep's."""
        return job_name(self.choices)

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.config.run.output_root, self.config.run.name)

    def settings(self) -> str:
        """Return a digest of the settings that decide what is trained."""
        values = to_dict(self.config)
        same = {"seed": self.config.run.seed, **{group: values[group] for group in _SAME}}
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a job; one entry of sweep.json."""

    choices: list[str]
    settings: str
    code: int
    """Exit code; 0 once it has finished."""
    message: str = ""
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    """The numbers of its summary.json."""
    peak_memory_bytes: int = 0
    """The largest of its ranks."""
    pruned: bool = False
    """Stopped by the search, because others were better at the same step."""


def job_name(choices: Sequence[str]) -> str:
    """Return the folder name of a job: its overrides by key, or a readable part of them and a digest."""
    text = ",".join(sorted(choice.lstrip("+") for choice in choices))
    plain = re.sub(r"[^\w.=,+-]", "_", text)
    if plain == text and len(plain) <= _LONGEST_NAME:
        return plain
    return f"{plain[: _LONGEST_NAME - 20]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def build_job(arguments: Sequence[str], choices: Sequence[str], sweep_name: str | None) -> tuple[Job, str]:
    """Return a job and the name of its sweep, which is the first job's ``run.name``.

    Raises:
        ConfigError: if these settings are wrong together.
    """
    typed = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    own = [*arguments, *choices, *(f"{key}={value}" for key, value in _PART_OF_A_SWEEP.items() if key not in typed)]
    sweep_name = sweep_name or compose_config("train", own).run.name
    own += [] if "track.wandb_group" in typed else [f"track.wandb_group={sweep_name}"]
    own = [argument for argument in own if argument.partition("=")[0].lstrip("+") != "run.name"]
    own.append(f"run.name={sweep_name}/{job_name(choices)}")
    return Job(tuple(sorted(choices)), own, check_verb("train", compose_config("train", own))), sweep_name


class Jobs:
    """Runs the jobs of one sweep, one after the other, and records what becomes of them."""

    def __init__(self, root: RunFolder) -> None:
        """Read the record of earlier starts in the sweep's folder."""
        self.root, self.stopped = root, False
        self._process: subprocess.Popen[bytes] | None = None
        self._file = root.path / RECORD
        self._record: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):  # without it, each job finds out by itself that it has finished
            self._record = read_json(self._file, dict[str, dict[str, Any]])

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Keep other sweeps out of the folder, and pass signals on to the running job.

        Raises:
            RunFolderError: if one is in it.
        """
        self.root.create()
        before = take_signals(STOP_SIGNALS, self._forward)
        handle = open_regular(self.root.path / ".sweep.lock", os.O_RDWR | os.O_CREAT, changes=False)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise RunFolderError(
                f"run.name: another sweep is running in {self.root.path}. Wait for it, or choose another run.name."
            ) from None
        finally:
            os.close(handle)
            give_back_signals(before)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)

    def finished(self, job: Job) -> Outcome | None:
        """Return the outcome of a job that has finished with these settings, or was pruned; None otherwise."""
        try:
            outcome = Outcome(**self._record[job.name])
        except (KeyError, TypeError):
            return None
        kept = outcome.pruned or (outcome.code == 0 and job.folder.finished)
        return outcome if kept and outcome.settings == job.settings() else None

    def run(self, job: Job, label: str, give_up: Callable[[], bool] = lambda: False) -> Outcome:
        """Run a job, unless it has finished; ``give_up`` is asked now and then whether to stop it.

        After a signal `stopped` is set, and no further job should be run.
        """
        if (before := self.finished(job)) is not None:
            print(f"{label} {visible(job.name)}: {'pruned' if before.pruned else 'finished'} before", flush=True)
            return before
        print(f"{label} {visible(job.name)}: {visible(command('train', *job.arguments))}", flush=True)
        started, clock = time.time(), time.monotonic()
        code, pruned = self._wait(job, give_up)
        outcome = _outcome(job, code, pruned and code == STOPPED_EXIT_CODE, started, time.monotonic() - clock)
        self.record(job, outcome)
        return outcome

    def record(self, job: Job, outcome: Outcome) -> None:
        """Write down what became of a job."""
        self._record[job.name] = asdict(outcome)
        write_json(self._file, self._record)

    def _wait(self, job: Job, give_up: Callable[[], bool]) -> tuple[int, bool]:
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        if Path.cwd() != PACKAGE.parent:
            environment["PYTHONSAFEPATH"] = "1"
        words = [sys.executable, "-m", "fsdp_qlora", "train", *job.arguments]
        # A session of its own: Ctrl-C reaches the job once, from here.
        process = self._process = subprocess.Popen(words, env=environment, start_new_session=True)
        pruned = False
        while process.poll() is None:
            time.sleep(_LOOK_SECONDS)
            if not pruned and not self.stopped and give_up():
                pruned = True
                process.send_signal(signal.SIGTERM)
        self._process, code = None, process.returncode
        return code if code >= 0 else 128 - code, pruned


def _outcome(job: Job, code: int, pruned: bool, started: float, seconds: float) -> Outcome:
    folder, message, values, peak = job.folder, "", {}, 0
    ended = folder.read_exit()
    if code != 0 and ended is not None and ended["time"] >= started:
        message = ended["message"]
    if code == 0:
        summary = folder.read_summary()
        values = {key: float(value) for key, value in summary.items() if isinstance(value, int | float)}
        peak = max((rank["peak_memory_bytes"] for rank in summary["ranks"]), default=0)
    return Outcome(list(job.choices), job.settings(), code, message, seconds, values, peak, pruned)
