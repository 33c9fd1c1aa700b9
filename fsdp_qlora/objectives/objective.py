"""`Objective`: the definition of a loss.

An objective returns *sums* and, for each, the name of its divisor, a count over the whole global batch. Not means: with
unequal numbers of targets, a mean of means over micro-batches and ranks would be a different loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from fsdp_qlora.config import choices
from fsdp_qlora.data.loader import MicroBatch

Sums = dict[str, tuple[torch.Tensor, str]]
"""Name -> a sum over a micro-batch, float32 ``[]``, and the name of the weight it is divided by (`Batch.weights`)."""


class Objective(ABC):
    """A loss. Stateless; the model is an `nn.Module` that returns the losses of supervised tokens."""

    name: ClassVar[str]
    """Its name in ``objective=``."""

    @abstractmethod
    def sums(self, model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> Sums:
        """Return the sums of a micro-batch, under the same names for every micro-batch.

        The loss is the total of all sums, each divided by its weight, and so are gradients. Every rank must call it the
        same number of times, because the model's forward contains collectives.
        """

    def metrics(self, loss: float, means: Mapping[str, float]) -> dict[str, float]:
        """Return further metrics that an evaluation reports besides the loss.

        Args:
            loss: the total of ``means``.
            means: each sum divided by its weight, over all held-out rows.
        """
        return {}


def loss_of(
    sums: Mapping[str, torch.Tensor], divided_by: Mapping[str, str], weights: Mapping[str, int]
) -> torch.Tensor:
    """Return the loss, ``[]``: the total of all sums, each divided by its weight."""
    parts = [value / max(1, weights[divided_by[name]]) for name, value in sums.items()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


_OBJECTIVES: choices.Registry[Objective] = choices.Registry(choices.OBJECTIVES)
register = _OBJECTIVES.register


def build_objective(name: str) -> Objective:
    """Return the objective called ``name``."""
    return _OBJECTIVES[name]()
