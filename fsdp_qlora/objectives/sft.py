"""What the loss is: an objective turns the model and a micro-batch into a *sum* over what is learned.

Sums, not means: a mean of means over micro-batches and ranks with unequal numbers of targets is another loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fsdp_qlora.objectives.objective import MicroBatch, Objective


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
