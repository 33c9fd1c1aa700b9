"""Settings of tracking: where metrics go in addition to metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fsdp_qlora.config.facts import VERBATIM


@dataclass(frozen=True)
class TrackSettings:
    """Where metrics go in addition to metrics.jsonl."""

    to: dict[str, bool] = field(default_factory=lambda: {"console": True})
    """Trackers that are on: ``track=[wandb,tensorboard]`` sets ``{wandb: true, tensorboard: true}``. ``wandb`` logs to
    Weights & Biases (offline if there is no API key); ``tensorboard`` writes event files into the run folder;
    ``mlflow`` logs to an MLflow server or a local database.
    ``console``, the progress display, is on unless it is ``false``."""
    wandb_project: Annotated[str, VERBATIM] = "fsdp_qlora"
    """W&B project."""
    wandb_entity: Annotated[str | None, VERBATIM] = None
    """W&B user or team."""
    wandb_group: Annotated[str | None, VERBATIM] = None
    """W&B group; null = the sweep that a job belongs to, if any."""
    wandb_tags: list[str] = field(default_factory=list)
    """W&B tags."""
    wandb_notes: Annotated[str | None, VERBATIM] = None
    """W&B notes."""
    wandb_adapter: bool = False
    """Upload the adapter to W&B as an artifact, once the run has finished."""

    mlflow_uri: Annotated[str | None, VERBATIM] = None
    """MLflow's server or database; null = ``MLFLOW_TRACKING_URI``, else ``sqlite:///<run.output_root>/mlflow.db``."""
    mlflow_experiment: Annotated[str, VERBATIM] = "fsdp_qlora"
    """MLflow experiment."""

    @property
    def names(self) -> list[str]:
        """The trackers that are on, the progress display first."""
        return [name for name, on in {"console": True, **self.to}.items() if on]
