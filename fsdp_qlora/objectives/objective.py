"""`Objective`: the definition of a loss.

An objective returns *sums* and, for each, the name of its divisor, a count over the whole global batch. Not means: with
unequal numbers of targets, a mean of means over micro-batches and ranks would be a different loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the sums of a micro-batch on the model's device, under the same names for every micro-batch.

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


def token_losses(model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Return the cross entropy of each supervised token, float32 ``[targets]``, for a micro-batch on the device."""
    return model(
        micro_batch.input_ids, micro_batch.labels, micro_batch.position_ids, micro_batch.supervised,
        sequences=micro_batch.sequences, rare=micro_batch.rare,
    )  # fmt: skip


def loss_of(sums: Sums, share: float, weights: Mapping[str, int]) -> torch.Tensor:
    """Return the loss, ``[]``: the total of all sums, times ``share``, each divided by its weight."""
    parts = [value * share / max(1, weights[divisor]) for value, divisor in sums.values()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class Totals:
    """Sums over several micro-batches. They stay on the device: reading one there waits for all work before it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self.divided_by: dict[str, str] = {}
        """Name of a sum -> name of its weight."""

    def add(self, sums: Sums, share: float) -> None:
        """Add the sums of a micro-batch, times ``share``, in float64."""
        for name, (value, divisor) in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * share
            self.divided_by[name] = divisor

    @property
    def values(self) -> list[torch.Tensor]:
        """The sums, float64 ``[]``, in the order of `means`."""
        return list(self._sums.values())

    def means(self, over_ranks: Sequence[float], weights: Mapping[str, int]) -> dict[str, float]:
        """Return each of the sums over all ranks divided by its weight."""
        divisors = self.divided_by.items()
        return {name: total / max(1, weights[w]) for (name, w), total in zip(divisors, over_ranks, strict=True)}


_OBJECTIVES: choices.Registry[Objective] = choices.Registry("objective", choices.OBJECTIVES)
register = _OBJECTIVES.register


def build_objective(name: str) -> Objective:
    """Return the objective called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    return _OBJECTIVES[name]()
