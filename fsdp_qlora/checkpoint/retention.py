"""Decides which checkpoints to keep: the newest, those at regular steps, and the best by held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.checkpoint.manifest import Manifest
from fsdp_qlora.errors import FsdpQloraError


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep; one rule that applies is enough."""

    keep_last: int = 2
    """Number of newest checkpoints; at least 1, so the newest complete one is never deleted."""
    keep_every: int = 0
    """Keep checkpoints whose step is a multiple of this; 0 = off."""
    keep_best: int = 0
    """Number of checkpoints with the lowest held-out loss, among those evaluated at their own step."""


def superfluous(complete: Sequence[Path], retention: Retention) -> list[Path]:
    """Return the checkpoints that no rule keeps; ``complete`` lists all complete ones, oldest first."""
    kept = set(complete[-max(1, retention.keep_last) :])
    if retention.keep_every:
        kept |= {folder for folder in complete if int(folder.name[5:]) % retention.keep_every == 0}
    if retention.keep_best:
        losses = {folder: loss for folder in complete if (loss := _held_out_loss(folder)) is not None}
        kept |= set(sorted(losses, key=lambda folder: (losses[folder], folder))[: retention.keep_best])
    return [folder for folder in complete if folder not in kept]


def _held_out_loss(folder: Path) -> float | None:
    try:
        manifest = Manifest.read(folder)
    except FsdpQloraError:
        return None
    progress = manifest.progress
    return progress.get("last_eval_loss") if progress.get("evaluated_step") == manifest.step else None
