"""`Objective`: what the loss is.

An objective gives *sums* and names what each is divided by, a count over the whole global batch. Not means: a mean of
means over micro-batches and ranks with unequal numbers of targets is another loss.
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
"""Name -> a sum over a micro-batch, float32 ``[]``, and the weight that it is divided by (`Batch.weights`)."""


class Objective(ABC):
    """What the loss is. Stateless; the model is an `nn.Module` that gives the losses of supervised tokens."""

    name: ClassVar[str]
    """Its name in ``objective=``."""

    @abstractmethod
    def sums(self, model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> Sums:
        """Return the sums of a micro-batch, under the same names for every micro-batch.

        The loss is the sum of each over its weight, and so are gradients. Every rank calls it as often: there are
        gathers in the model.
        """

    def metrics(self, loss: float, means: Mapping[str, float]) -> dict[str, float]:
        """Return what an evaluation says beside the loss.

        Args:
            loss: the sum of ``means``.
            means: each sum over its weight, over all held-out rows.
        """
        return {}


def loss_of(
    sums: Mapping[str, torch.Tensor], divided_by: Mapping[str, str], weights: Mapping[str, int]
) -> torch.Tensor:
    """Return the loss of sums, ``[]``: each over its weight, added up."""
    parts = [value / max(1, weights[divided_by[name]]) for name, value in sums.items()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


_OBJECTIVES: dict[str, type[Objective]] = {}


def register(kind: type[Objective]) -> type[Objective]:
    """Make an objective known by its name: ``objective=NAME`` then takes it (on the command line: those that ship)."""
    _OBJECTIVES[kind.name] = kind
    choices.OBJECTIVES.add(kind.name)
    return kind


def build_objective(name: str) -> Objective:
    """Return the objective called ``name``."""
    return _OBJECTIVES[name]()
