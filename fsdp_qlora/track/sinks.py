"""The trackers of ``track=``: where metrics go in addition to metrics.jsonl and the progress display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import TrackSettings
from fsdp_qlora.track.tracker import Sink
from fsdp_qlora.track.wandb import open_wandb


def _nothing_more(folder: Path, name: str, settings: TrackSettings, config: dict[str, Any]) -> None:
    """Open no sink: every run has the progress display."""


TRACKERS: choices.Table[Callable[[Path, str, TrackSettings, dict[str, Any]], Sink | None]] = choices.Table(
    "track", {"console": _nothing_more, "wandb": open_wandb}
)
"""Name -> opens its sink, given the run's folder, its name, the settings of the group and all settings, to publish."""
