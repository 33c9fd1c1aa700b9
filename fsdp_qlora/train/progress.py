"""How far a run is: a few numbers that say everything a resume needs besides the tensors."""

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
    """Of these, rows that were passed over after a bad step."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps, what a spike is measured against."""
    tokens: int = 0
    """Input tokens without padding, over all ranks."""
    target_tokens: int = 0
    """Supervised tokens, over all ranks."""
    best_eval_loss: float | None = None
    evals_without_gain: int = 0
    """Evaluations since the best one, for early stopping."""
    first_eval_loss: float | None = None
    """Held-out loss before the first step."""
    last_eval_loss: float | None = None
    evaluated_step: int = -1
    """Step of the last evaluation."""

    def advance(self, num_rows: int, num_tokens: int, target_tokens: int, loss: float) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.recent_losses = [*self.recent_losses, loss][-RECENT_STEPS:]
        self.position += num_rows
        self.tokens += num_tokens
        self.target_tokens += target_tokens

    def evaluated(self, loss: float) -> None:
        """Count one evaluation."""
        self.last_eval_loss, self.evaluated_step = loss, self.step
        if self.step == 0:
            self.first_eval_loss = loss
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.evals_without_gain = loss, 0
        else:
            self.evals_without_gain += 1

    def spike_above(self, factor: float) -> float:
        """Return the loss that counts as a spike: ``factor`` times the recent mean; infinite while few are known."""
        known = self.recent_losses
        return factor * sum(known) / len(known) if factor > 0 and len(known) == RECENT_STEPS else math.inf

    @staticmethod
    def problem(values: dict[str, Any]) -> str | None:
        """Return what of the values of a checkpoint cannot be a progress's, or None."""
        kinds = get_type_hints(Progress)
        for name, value in values.items():
            if (wrong := misfit(value, kinds[name], f"progress.{name}")) is not None:
                return wrong
            if kinds[name] is int and value < (-1 if name == "evaluated_step" else 0):
                return f"progress.{name} is {value}"
        return None

    def restore(self, values: dict[str, Any]) -> None:
        """Take the values of a checkpoint; see `problem`."""
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
