"""What the loss is: an objective turns the model and a micro-batch into a *sum* over what is learned.

Sums, not means: a mean of means over micro-batches and ranks with unequal numbers of targets is another loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from fsdp_qlora.plan.batch import Sequences


class MicroBatch(Protocol):
    """What an objective needs of a micro-batch."""

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 ``[rows, length]``."""
        ...

    @property
    def labels(self) -> torch.Tensor:
        """int64 ``[rows, length]``, -100 where not learned."""
        ...

    @property
    def position_ids(self) -> torch.Tensor | None:
        """int64 ``[rows, length]``, starting anew at each packed row; None where a sequence is one row."""
        ...

    @property
    def sequences(self) -> Sequences | None:
        """Where the rows of one flat row begin and end; None where positions tell, or each line is one row."""
        ...

    @property
    def rare(self) -> bool:
        """Whether layers are not worth compiling for its form."""
        ...

    @property
    def supervised(self) -> torch.Tensor:
        """int64 ``[targets]``: positions of the flattened labels whose next token is learned."""
        ...


Objective = Callable[[nn.Module, MicroBatch, torch.device], torch.Tensor]
"""(model, micro-batch, device) -> sum of losses, a float32 scalar."""


def token_losses(model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Return the cross entropy of each supervised token, float32 ``[targets]``."""
    positions, sequences = micro_batch.position_ids, micro_batch.sequences
    if sequences is not None:
        sequences = replace(sequences, boundaries=sequences.boundaries.to(device))
    return model(
        micro_batch.input_ids.to(device), micro_batch.labels.to(device),
        None if positions is None else positions.to(device), micro_batch.supervised.to(device),
        sequences=sequences, rare=micro_batch.rare,
    )  # fmt: skip


def supervised_fine_tuning(model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Return the sum of the cross entropy of all supervised tokens."""
    return token_losses(model, micro_batch, device).sum()


OBJECTIVES: dict[str, Objective] = {"sft": supervised_fine_tuning}
