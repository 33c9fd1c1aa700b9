"""One optimizer step: micro-batches, one reduction, clipping, update. Its numbers do not depend on the rank count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.profiler import record_function

from fsdp_qlora.data.loader import Batch, MicroBatch
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_sum
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.errors import LossSpikeError, NonFiniteError
from fsdp_qlora.objectives import Objective, Totals, loss_of
from fsdp_qlora.scopes import OPTIMIZER


class Optimizer(Protocol):
    """What a step needs from an optimizer."""

    def grad_square_sum(self, ranks: Ranks) -> torch.Tensor:
        """Return this rank's share of the gradient's sum of squares, ``[]``; over all ranks, each counts once."""
        ...

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update the parameters and free the gradients."""
        ...


class Fallback(Protocol):
    """What a step tells that something did not work on a rank and must now be done another way on all of them."""

    @property
    def failed(self) -> bool:
        """Whether this rank has something to tell."""
        ...

    def agree(self, step: int) -> None:
        """Settle what all ranks do from now on. A collective, called if any rank ``failed``, before the update."""
        ...


def _nowhere(phase: str) -> None:
    """Ignore the phase: nothing watches it."""


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class StepSettings:
    """Settings that do not change from step to step."""

    objective: Objective
    ranks: Ranks
    seed: int
    max_grad_norm: float
    synchronize: Callable[[nn.Module, bool], None]
    """Called with (model, whether the next backward reduces gradients over the ranks)."""
    around: Callable[[], AbstractContextManager[object]]
    """Context around forward and backward (anomaly detection)."""
    enter: Callable[[str], None] = _nowhere
    """Called with what this rank is about to do, so that the watch thread can detect hanging ranks."""
    before_update: Callable[[], None] = _nothing
    """Called before the parameters and the optimizer's state change."""
    reduce: Callable[[], None] = _nothing
    """Called after the last backward, to reduce gradients that FSDP does not."""
    checks: Sequence[Callable[[int], None]] = ()
    """Called with the step number once all gradients are reduced."""
    fallback: Fallback | None = None
    """Asked after the last backward; its answer travels with the losses, because a message of its own would be one more
    wait for the device."""


@dataclass(frozen=True)
class StepOutcome:
    """Result of a step, equal on every rank."""

    loss: float
    """Sum of the objective's sums, each divided by its weight."""
    grad_norm: float
    """Before clipping."""
    stop: bool
    """Whether any rank was asked to stop."""


def forward_backward(model: nn.Module, batch: Batch, number: int, settings: StepSettings) -> Totals:
    """Run this rank's micro-batches of step ``number`` and return the totals of their sums.

    Gradients are left on the parameters; those of sharded parameters are reduced over the ranks.
    """
    last = len(batch.micro_batches) - 1
    totals = Totals()

    def draw(micro_batch: MicroBatch) -> None:
        # Dropout masks depend on the micro-batch, not on the rank that happens to run it.
        torch.manual_seed(seed_of(settings.seed, number, micro_batch.number))

    settings.enter(f"step {number}, before its micro-batches")
    objective = settings.objective.before(model, batch.micro_batches, settings.ranks, draw)
    for turn, micro_batch in enumerate(batch.micro_batches):
        settings.enter(f"step {number}, micro-batch {turn + 1} of {last + 1}")
        settings.synchronize(model, turn == last)
        draw(micro_batch)
        with settings.around():
            sums = objective.sums(model, micro_batch.to(settings.ranks.device))
            loss_of(sums, micro_batch.weight, batch.weights).backward()
        totals.add(sums, micro_batch.weight)
    return totals


def train_step(
    model: nn.Module, batch: Batch, optimizer: Optimizer, lr: float, number: int, stop: bool,
    settings: StepSettings, spike_above: float = math.inf,
) -> StepOutcome:  # fmt: skip
    """Run step ``number`` (counted from 1) and update the parameters. A collective.

    Raises:
        NonFiniteError: identically on every rank, before the update, if the loss or the gradient is not finite.
        LossSpikeError: likewise, if the loss is above ``spike_above``.
    """
    ranks = settings.ranks
    totals = forward_backward(model, batch, number, settings)
    settings.enter(f"step {number}, update")
    settings.reduce()
    for check in settings.checks:
        check(number)
    with record_function(OPTIMIZER):
        own_squares = optimizer.grad_square_sum(ranks)
    fallback = settings.fallback
    flags = [float(stop), float(fallback is not None and fallback.failed)]
    *sums, squares, stops, failures = all_sum([*totals.values, own_squares, *flags], ranks)
    if fallback is not None and failures > 0:
        fallback.agree(number)
    loss_mean = sum(totals.means(sums, batch.weights).values())
    grad_norm = math.sqrt(max(0.0, squares))
    if math.isnan(squares) or not math.isfinite(loss_mean) or not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"step {number}: loss {loss_mean}, gradient norm {grad_norm}; the parameters were not updated."
        )
    if loss_mean > spike_above:
        raise LossSpikeError(
            f"step {number}: loss {loss_mean:.4f} is above {spike_above:.4f}, a spike; the parameters were not updated."
        )
    settings.before_update()
    limit = settings.max_grad_norm
    with record_function(OPTIMIZER):
        optimizer.step(lr, min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0)
    return StepOutcome(loss_mean, grad_norm, stops > 0)
