"""How far a run is: a few numbers that say everything a resume needs besides the tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counts since the start of the run, the same on every rank."""

    step: int = 0
    """Optimizer updates made."""
    position: int = 0
    """Training rows consumed, over all ranks: the loader's whole state."""
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

    def advance(self, num_rows: int, num_tokens: int, num_targets: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.position += num_rows
        self.tokens += num_tokens
        self.target_tokens += num_targets

    def evaluated(self, loss: float) -> None:
        """Count one evaluation."""
        self.last_eval_loss, self.evaluated_step = loss, self.step
        if self.step == 0:
            self.first_eval_loss = loss
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.evals_without_gain = loss, 0
        else:
            self.evals_without_gain += 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
