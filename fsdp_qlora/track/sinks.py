"""The trackers of ``track=``: where metrics go in addition to metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.config import choices
from fsdp_qlora.config.track import TrackSettings
from fsdp_qlora.track.behind import Behind
from fsdp_qlora.track.console import ConsoleProgress
from fsdp_qlora.track.mlflow import MlflowSink
from fsdp_qlora.track.sink import Sink
from fsdp_qlora.track.tensorboard import TensorBoardSink
from fsdp_qlora.track.tracker import Beside
from fsdp_qlora.track.wandb import open_wandb


@dataclass(frozen=True)
class Tracked:
    """The run that a sink is opened for."""

    folder: Path
    name: str
    settings: TrackSettings
    config: dict[str, Any]
    """All settings, in the form in which others may read them (`published`)."""
    step: int
    """The step it resumes from; 0 for a new run."""
    total_steps: int


def _console(run: Tracked) -> Sink:
    return Beside(ConsoleProgress(run.total_steps, run.step), "the progress display")


def _wandb(run: Tracked) -> Sink:
    return Behind("track=wandb", lambda: open_wandb(run.folder, run.name, run.settings, run.config))


def _tensorboard(run: Tracked) -> Sink:
    return Behind("track=tensorboard", lambda: TensorBoardSink(run.folder, run.config, run.step))


def _mlflow(run: Tracked) -> Sink:
    return Behind("track=mlflow", lambda: MlflowSink(run.folder, run.name, run.settings, run.config))


TRACKERS: choices.Table[Callable[[Tracked], Sink]] = choices.Table(
    "track", {"console": _console, "wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow}
)
"""Name -> opens its sink. A sink is never the reason why a run stops: it is wrapped in `Beside` or `Behind`."""


def open_sinks(run: Tracked) -> list[Sink]:
    """Open the sinks of the settings, and the progress display unless it was switched off."""
    return [TRACKERS[name](run) for name in choices.TRACKERS if name in run.settings.names]
