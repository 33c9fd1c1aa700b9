"""sft: supervised fine-tuning, the cross entropy of supervised tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from fsdp_qlora.data.labels import TOKENS
from fsdp_qlora.data.loader import MicroBatch
from fsdp_qlora.objectives.objective import Objective, Sums, register


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


@register
class SupervisedFineTuning(Objective):
    """The mean cross entropy over all supervised tokens of the global batch."""

    name = "sft"

    def sums(self, model: nn.Module, micro_batch: MicroBatch, device: torch.device) -> Sums:
        """Return the sum of the cross entropy of all supervised tokens."""
        return {"loss": (token_losses(model, micro_batch, device).sum(), TOKENS)}

    def metrics(self, loss: float, means: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity: exp(loss), or infinity if that overflows."""
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}
