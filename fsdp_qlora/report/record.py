"""What a run folder holds, read as data that somebody else may have written.

Whatever is missing or damaged is left out, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora.config.saved import read_config
from fsdp_qlora.errors import STOPPED_EXIT_CODE, ConfigError, FsdpQloraError, SecurityError
from fsdp_qlora.files.read import parse_json, read_json, read_regular
from fsdp_qlora.report.metrics import Metrics, MetricsFile
from fsdp_qlora.run.folder import RunFolder

_SIGNS = ("config.yaml", "metrics.jsonl", "summary.json", "exit.json")
"""A folder with one of these files is a run's."""
_LARGEST = 20_000_000
"""Bytes of a file that are shown in part; none that we write comes near."""


@dataclass
class Run:
    """One run, as its folder tells it."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    """config.yaml: groups of settings."""
    start: dict[str, Any] = field(default_factory=dict)
    """start.json: what the run knew before its first step."""
    summary: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """plan.json, if the report was asked to simulate the run."""
    ranks: dict[str, Any] = field(default_factory=dict)
    """ranks.json: what each rank was doing when the watch last looked."""
    ending: dict[str, Any] | None = None
    """exit.json; None while the run goes on, or if it was killed."""
    metrics: Metrics = field(default_factory=Metrics)
    samples: list[Any] = field(default_factory=list)
    """Training rows as the model sees them: lists of segments."""
    answers: list[Any] = field(default_factory=list)
    """Answers to the sample prompts at evaluations."""
    messages: list[Any] = field(default_factory=list)
    """Warnings that the run printed, with their times."""
    remarks: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def state(self) -> str:
        """How the run stands, in a few words."""
        if self.ending is None:
            return "finished" if self.finished else "not ended: still running, or killed"
        code = self.ending["code"]
        if code == 0:
            return "finished"
        return "stopped by a signal" if code == STOPPED_EXIT_CODE else f"failed with exit code {code}"

    @property
    def total_steps(self) -> int | None:
        """How many steps the run has when it ends, if that is recorded."""
        steps = self.summary.get("steps", self.start.get("total_steps"))
        return steps if isinstance(steps, int) and steps > 0 else None

    def settings(self, group: str) -> dict[str, Any]:
        """Return a group of settings; empty if there is none."""
        values = self.config.get(group)
        return values if isinstance(values, dict) else {}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).is_file() for name in _SIGNS)


def run_folders(paths: Sequence[str], verb: str) -> list[Path]:
    """Return the run folders that ``paths`` name: each a run, or a sweep with a run in each of its subfolders.

    Raises:
        ConfigError: naming the first path that is neither.
    """
    folders: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        path = path.parent if path.is_file() and path.name in _SIGNS else path
        if not path.is_dir():
            raise ConfigError(f"{verb}: there is no folder {text}. Give a run's folder, outputs/NAME.")
        below = [] if is_run(path) else [each for each in sorted(path.iterdir()) if each.is_dir() and is_run(each)]
        if not below and not is_run(path):
            raise ConfigError(
                f"{verb}: {text} is no run's folder, nor one of several: it has none of {', '.join(_SIGNS)}. Give "
                "outputs/NAME, as `train` printed it."
            )
        folders += [each.absolute() for each in below or [path]]
    return list(dict.fromkeys(folders))


def read_run(folder: Path, metrics: MetricsFile | None = None) -> Run:
    """Read what a run folder holds; ``metrics`` has read its metrics.jsonl before, or None."""
    files = RunFolder(str(folder.parent), folder.name)
    run = Run(folder)
    if files.config_file.exists():
        try:
            run.config = read_config(str(files.config_file), "config.yaml")
        except FsdpQloraError as error:
            run.remarks.append(str(error))
    for name in ("start", "summary", "versions", "plan", "ranks"):
        setattr(run, name, _mapping(folder / f"{name}.json", run.remarks))
    run.ending = files.read_exit()
    run.samples = _lines(folder / "samples.jsonl", run.remarks)
    run.answers = _lines(files.answers_file, run.remarks)
    run.messages = _lines(files.messages_file, run.remarks)
    try:
        run.metrics = (metrics or MetricsFile(files.metrics_file)).poll()
    except FileNotFoundError:
        run.remarks.append("metrics.jsonl: not there, so there are no curves.")
    except (OSError, SecurityError) as error:
        run.remarks.append(f"metrics.jsonl: {error}")
    if run.metrics.unreadable:
        run.remarks.append(f"metrics.jsonl: {run.metrics.unreadable} lines are damaged and left out.")
    return run


def _mapping(file: Path, remarks: list[str]) -> dict[str, Any]:
    """Return a file's JSON object; empty if it is missing or damaged."""
    try:
        return read_json(file, dict[str, Any], _LARGEST)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, SecurityError) as error:
        remarks.append(f"{file.name}: {error}")
        return {}


def _lines(file: Path, remarks: list[str]) -> list[Any]:
    """Return the values of a file of JSON lines; those that are damaged are left out."""
    try:
        lines = [line for line in read_regular(file, _LARGEST).split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, SecurityError) as error:
        remarks.append(f"{file.name}: {error}")
        return []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            remarks.append(f"{file.name}, line {number}: {error}")
    return values
