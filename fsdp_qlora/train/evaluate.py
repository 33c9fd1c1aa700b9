"""Held-out loss, weighted as the objective specifies; the number of ranks does not change it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fsdp_qlora.data.labels import TOKENS
from fsdp_qlora.data.loader import MicroBatch
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_sum, gather_json
from fsdp_qlora.objectives import Objective, Totals


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation."""

    loss: float
    """Sum of ``means``; for supervised fine-tuning, the mean cross entropy of the supervised tokens."""
    means: dict[str, float]
    """Each of the objective's sums, divided by its weight."""
    divided_by: dict[str, str]
    """Name of a sum -> name of its weight."""
    weights: Mapping[str, int]
    metrics: dict[str, float]
    """What the objective reports besides the loss."""
    observed: Sequence[Any] = ()
    """What the objective scores of each row, over all ranks."""
    sources: dict[str, Evaluation] = field(default_factory=dict)
    """The same for the rows of each source."""

    @property
    def by_source(self) -> dict[str, float]:
        """Loss per source, if there are several sources."""
        return {name: part.loss for name, part in self.sources.items()} if len(self.sources) > 1 else {}

    @property
    def target_tokens(self) -> int:
        """Supervised tokens."""
        return self.weights[TOKENS]

    def values(self) -> dict[str, float]:
        """Return loss and metrics under their names in metrics.jsonl."""
        return {"eval_loss": self.loss} | {f"eval_{name}": value for name, value in self.metrics.items()}


def together(parts: dict[str, Evaluation], objective: Objective) -> Evaluation:
    """Combine the evaluations of all parts into one over all their rows."""
    evaluations = list(parts.values())
    divided_by = evaluations[0].divided_by
    weights = {name: sum(part.weights[name] for part in evaluations) for name in evaluations[0].weights}
    means = {
        name: sum(part.means[name] * part.weights[weight] for part in evaluations) / max(1, weights[weight])
        for name, weight in divided_by.items()
    }
    loss = sum(means.values())
    observed = [row for part in evaluations for row in part.observed]
    metrics = objective.metrics(loss, means) | (objective.score(observed) if observed else {})
    return Evaluation(loss, means, divided_by, weights, metrics, observed, parts)


def evaluate(
    model: nn.Module, micro_batches: Iterable[MicroBatch], objective: Objective, weights: Mapping[str, int],
    ranks: Ranks,
) -> Evaluation:  # fmt: skip
    """Evaluate on this rank's ``micro_batches``; every rank must have the same number of them, at least one.

    Restores the model's training mode and leaves its gradients untouched. A collective.
    """
    was_training = model.training
    model.eval()
    totals, own = Totals(), list[Any]()
    with torch.no_grad():
        for micro_batch in micro_batches:
            sums, rows = objective.observe(model, micro_batch.to(ranks.device))
            totals.add(sums, micro_batch.weight)
            own += rows if micro_batch.weight else []
    model.train(was_training)
    means = totals.means(all_sum(totals.values, ranks), weights)
    loss = sum(means.values())
    observed = [row for rows in gather_json(own, ranks) for row in rows] if objective.scores_rows else []
    metrics = objective.metrics(loss, means) | (objective.score(observed) if observed else {})
    return Evaluation(loss, means, totals.divided_by, weights, metrics, observed)
