"""What classifiers of texts and of images share: labels, losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fsdp_qlora.config.schema import ObjectiveSettings
from fsdp_qlora.data.labels import ROWS
from fsdp_qlora.data.loader import MicroBatch, NamedBatch
from fsdp_qlora.objectives.labels import MULTI, REGRESSION, SINGLE, Labels, label_maps
from fsdp_qlora.objectives.objective import Objective, Sums, without_cache
from fsdp_qlora.objectives.scores import of_labels, of_numbers, of_sets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LABEL = "label"
"""Column of stored rows, and tensor of micro-batches: what `Labels.vector` makes of a row's label."""


class Labelled(Objective):
    """An objective whose model has an output for each label."""

    trains_head = True
    scores_rows = True

    def __init__(self, settings: ObjectiveSettings | None = None) -> None:
        super().__init__(settings)
        self.labels = Labels(self.settings)

    @property
    def packages(self) -> tuple[str, ...]:
        """What its metrics are computed by."""
        return ("sklearn",)

    def configure(self, config: PreTrainedConfig) -> None:
        """Set the labels, and what they are."""
        config.update(dict(label_maps(self.labels)))
        without_cache(config)

    def label_factors(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return the factor of each label's loss (``objective.class_weights``), ``[labels]``; None if all are 1."""
        factors = self.settings.class_weights
        return logits.new_tensor([factors.get(name, 1.0) for name in self.labels.names]) if factors else None


class Classifier(Labelled):
    """The loss of transformers' own classifiers, as a mean over rows."""

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the summed loss of the rows."""
        return {"loss": (self._losses(*self._logits(model, micro_batch)), ROWS)}

    def observe(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Sums, list[Any]]:
        """Return the sums, and for each row what is predicted and what is right."""
        logits, wanted = self._logits(model, micro_batch)
        sums: Sums = {"loss": (self._losses(logits, wanted), ROWS)}
        if self.labels.problem == SINGLE:
            predicted = logits.argmax(1, keepdim=True)
        else:
            predicted = (logits > 0).long() if self.labels.problem == MULTI else logits
        return sums, [list(pair) for pair in zip(predicted.tolist(), wanted.tolist(), strict=True)]

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return accuracy and macro F1, or the mean squared error and correlation of numbers."""
        predicted, wanted = zip(*observed, strict=True)
        kinds = {SINGLE: of_labels, MULTI: of_sets, REGRESSION: of_numbers}
        return kinds[self.labels.problem](predicted, wanted)

    def options(self, model: nn.Module) -> dict[str, Any]:
        """Return what the model's forward is given beside the tensors of a micro-batch."""
        return {}

    def _logits(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 ``[rows, outputs]`` and the labels ``[rows, columns]``."""
        assert isinstance(micro_batch, NamedBatch)
        inputs = dict(micro_batch.tensors)
        wanted = inputs.pop(LABEL)
        return model.outputs(**inputs, **self.options(model)).logits.float(), wanted  # type: ignore[operator]

    def _losses(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return the sum over rows; of several labels or numbers, each row counts their mean, as upstream's does."""
        if self.labels.problem == REGRESSION:
            return F.mse_loss(logits, wanted, reduction="sum") / wanted.shape[1]
        if self.labels.problem == MULTI:
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / wanted.shape[1]
        return F.cross_entropy(logits, wanted[:, 0].long(), weight=self.label_factors(logits), reduction="sum")


def stand_in_labels(labels: Labels, rows: int) -> torch.Tensor:
    """Return labels for `Objective.stand_in`, float32 ``[rows, columns]``: each row has the first one."""
    columns = len(labels.names) if labels.problem == MULTI else 1
    return torch.zeros(rows, columns)


def label_rows(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return the stored labels of rows, float32 ``[rows, columns]``."""
    return torch.from_numpy(np.stack([row[LABEL] for row in rows]).astype(np.float32))
