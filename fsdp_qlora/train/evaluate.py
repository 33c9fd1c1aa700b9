"""Held-out loss, weighted by token and equal on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_sum
from fsdp_qlora.objectives.objective import Objective
from fsdp_qlora.train.step import NumberedMicroBatch


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave."""

    loss: float
    """Mean cross entropy of the supervised tokens."""
    target_tokens: int
    by_source: dict[str, float] = field(default_factory=dict)
    """Loss of each source's rows, where there are several."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def together(parts: dict[str, Evaluation]) -> Evaluation:
    """Return the evaluation of all parts' tokens from those of the parts."""
    targets = sum(part.target_tokens for part in parts.values())
    loss = sum(part.loss * part.target_tokens for part in parts.values()) / max(1, targets)
    return Evaluation(loss, targets, {name: part.loss for name, part in parts.items()} if len(parts) > 1 else {})


def evaluate(
    model: nn.Module, micro_batches: Iterable[NumberedMicroBatch], objective: Objective, num_targets: int, ranks: Ranks
) -> Evaluation:
    """Evaluate on this rank's ``micro_batches``; every rank has the same number of them.

    Leaves the model in the mode it was in, and its gradients untouched.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for micro_batch in micro_batches:
            total += float(objective(model, micro_batch, ranks.device)) * micro_batch.weight
    model.train(was_training)
    (loss_sum,) = all_sum([total], ranks)
    return Evaluation(loss_sum / max(1, num_targets), num_targets)
