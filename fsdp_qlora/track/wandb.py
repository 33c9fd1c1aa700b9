"""Weights & Biases as a sink: rank 0 only, offline without a key, the same run after a resume."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from fsdp_qlora.config.schema import TrackSettings


class WandbSink:
    """Sends metrics to one W&B run, whose id is kept in the run folder."""

    def __init__(self, folder: Path, name: str, settings: TrackSettings, config: dict[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        # x_disable_meta, save_code: W&B would otherwise record the command line and the code by itself.
        self._run = wandb.init(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            id=id_file.read_text().strip(),
            name=name,
            resume="allow",
            mode=None if _has_key() else "offline",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(x_disable_meta=True, save_code=False, console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of a step."""
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """W&B cannot unsay a step; the ones that are run again come a second time, with the same ``step``."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _has_key() -> bool:
    netrc = Path("~/.netrc").expanduser()
    known = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
    return known or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
