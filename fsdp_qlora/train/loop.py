"""The loop: step, log, evaluate, save, until done or asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn
from torch.profiler import record_function

from fsdp_qlora.data.labels import TOKENS
from fsdp_qlora.data.loader import Batch
from fsdp_qlora.errors import NonFiniteError
from fsdp_qlora.optim.schedules import Schedule
from fsdp_qlora.scopes import DATA
from fsdp_qlora.track.meter import Meter
from fsdp_qlora.track.tracker import Tracker
from fsdp_qlora.train.evaluate import Evaluation
from fsdp_qlora.train.length import Length
from fsdp_qlora.train.progress import Progress
from fsdp_qlora.train.recovery import Recovery
from fsdp_qlora.train.step import Optimizer, StepSettings, train_step


@dataclass(frozen=True)
class Due:
    """When to log, evaluate and save; 0 means never."""

    length: Length
    log_every: int
    eval_every: int
    save_every: int
    patience: int
    spike_factor: float = 0.0

    @staticmethod
    def _every(step: int, interval: int) -> bool:
        return interval > 0 and step % interval == 0

    def log(self, progress: Progress) -> bool:
        """Whether to log the step just made; the last step is always logged, unless logging is off."""
        return self._every(progress.step, self.log_every) or (self.log_every > 0 and self.length.reached(progress))

    def evaluate(self, progress: Progress) -> bool:
        """Whether to evaluate now; always true at the start and at the end."""
        return progress.step == 0 or self._every(progress.step, self.eval_every) or self.length.reached(progress)

    def save(self, step: int) -> bool:
        """Whether to save a checkpoint after this step."""
        return self._every(step, self.save_every)


@dataclass(frozen=True)
class LoopHooks:
    """Callbacks that the loop needs from its caller."""

    batch_at: Callable[[int], Batch]
    """Row position -> this rank's part of the global batch that starts there."""
    evaluate: Callable[[], Evaluation | None]
    save: Callable[[Progress], None]
    """Start a checkpoint."""
    save_stall: Callable[[], float | None]
    """Seconds that saving has delayed training since the last call; None if nothing was saved."""
    finish: Callable[[Progress], None]
    """Make sure the checkpoint of this step is on disk."""
    stop_requested: Callable[[], bool]
    """Whether this rank has a reason to stop; the step turns it into a decision of all ranks."""
    peak_memory: Callable[[], int]
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Context around each step, including the wait for its batch, given the step's number (a profiler)."""


def train_loop(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    peak_lr: float,
    progress: Progress,
    due: Due,
    settings: StepSettings,
    hooks: LoopHooks,
    recovery: Recovery,
    tracker: Tracker,
    meter: Meter,
) -> bool:
    """Train until ``due.length`` is reached; return False if a signal stopped it earlier (after saving)."""
    model.train()
    _evaluate_if_due(due, hooks, progress, tracker)
    while not due.length.reached(progress):
        lr = peak_lr * schedule(due.length.scheduled(progress))
        with hooks.around_step(progress.step + 1):
            with meter.waiting(), record_function(DATA):
                batch = hooks.batch_at(progress.position)
            try:
                with meter.step():
                    outcome = train_step(
                        model, batch, optimizer, lr, progress.step + 1, hooks.stop_requested(), settings,
                        progress.spike_above(due.spike_factor),
                    )  # fmt: skip
            except NonFiniteError as error:
                recovery(error, batch, progress, tracker)
                continue
        recovery.went_well()
        if (stall := hooks.save_stall()) is not None:  # from the previous step's checkpoint
            tracker.log(progress.step, {"checkpoint_stall_seconds": stall})
        progress.advance(batch.num_rows, batch.num_tokens, batch.weights[TOKENS], outcome.loss)
        meter.count(batch.num_tokens, batch.weights[TOKENS], batch.num_rows)
        if due.log(progress):
            values = {"loss": outcome.loss, "grad_norm": outcome.grad_norm, "lr": lr}
            totals = {"tokens": progress.tokens, "target_tokens": progress.target_tokens}
            tracker.log(progress.step, values | totals | meter.read() | {"peak_memory_bytes": hooks.peak_memory()})
        stopped = outcome.stop and not due.length.reached(progress)
        if not stopped:
            _evaluate_if_due(due, hooks, progress, tracker)
        if due.save(progress.step):
            hooks.save(progress)
        if stopped:
            hooks.finish(progress)
            return False
        if due.patience and progress.evals_without_gain >= due.patience:
            break
    _evaluate_if_due(due, hooks, progress, tracker)  # the last batch may have been skipped
    hooks.finish(progress)
    return True


def _evaluate_if_due(due: Due, hooks: LoopHooks, progress: Progress, tracker: Tracker) -> None:
    """Evaluate if due, unless these weights were already evaluated (before the checkpoint the run resumed from)."""
    if due.evaluate(progress) and progress.evaluated_step < progress.step:
        record_evaluation(hooks.evaluate(), progress, tracker)


def record_evaluation(result: Evaluation | None, progress: Progress, tracker: Tracker) -> None:
    """Count and log an evaluation, if there was anything to evaluate on."""
    progress.evaluated_step = progress.step
    if result is None:
        return
    progress.evaluated(result.loss, result.metrics)
    tracker.log(
        progress.step, result.values() | ({"eval_loss_by_source": result.by_source} if result.by_source else {})
    )
