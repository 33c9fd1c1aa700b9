"""How far a run has come: the few numbers that a resume needs besides the tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from fsdp_qlora.files.read import misfit

RECENT_STEPS = 16


@dataclass
class Progress:
    """Counts since the start of the run, the same on every rank."""

    step: int = 0
    """Optimizer updates made."""
    position: int = 0
    """Training rows consumed, over all ranks: the loader's whole state."""
    rows_left_out: int = 0
    """How many of these rows were skipped because of bad steps."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the latest steps, against which a spike is measured."""
    tokens: int = 0
    """Input tokens over all ranks, without padding."""
    target_tokens: int = 0
    """Supervised tokens, over all ranks."""
    best_eval_loss: float | None = None
    evals_without_gain: int = 0
    """Evaluations since the best one, for early stopping."""
    first_eval_loss: float | None = None
    """Held-out loss before the first step."""
    last_eval_loss: float | None = None
    first_metrics: dict[str, float] = field(default_factory=dict)
    """The objective's metrics before the first step."""
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluated_step: int = -1
    """Step of the last evaluation."""

    def advance(self, num_rows: int, num_tokens: int, target_tokens: int, loss: float) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.recent_losses = [*self.recent_losses, loss][-RECENT_STEPS:]
        self.position += num_rows
        self.tokens += num_tokens
        self.target_tokens += target_tokens

    def evaluated(self, loss: float, metrics: dict[str, float]) -> None:
        """Count one evaluation."""
        self.last_eval_loss, self.last_metrics, self.evaluated_step = loss, metrics, self.step
        if self.step == 0:
            self.first_eval_loss, self.first_metrics = loss, metrics
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.evals_without_gain = loss, 0
        else:
            self.evals_without_gain += 1

    def spike_above(self, factor: float) -> float:
        """Return the spike threshold: ``factor`` times the mean of recent losses; infinite while there are too few."""
        known = self.recent_losses
        return factor * sum(known) / len(known) if factor > 0 and len(known) == RECENT_STEPS else math.inf

    @staticmethod
    def problem(values: dict[str, Any]) -> str | None:
        """Return what makes a checkpoint's values invalid as a progress, or None if they are valid."""
        kinds = get_type_hints(Progress)
        for name, value in values.items():
            if (wrong := misfit(value, kinds[name], f"progress.{name}")) is not None:
                return wrong
            if kinds[name] is int and value < (-1 if name == "evaluated_step" else 0):
                return f"progress.{name} is {value}"
        return None

    def restore(self, values: dict[str, Any]) -> None:
        """Restore the values from a checkpoint; check them with `problem` first."""
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
