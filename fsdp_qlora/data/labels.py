"""Labels: which tokens are learned, and where the sequences of a row begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


IGNORE = -100
"""Label of a token that is not learned (torch's ``ignore_index``)."""
TOKENS, ROWS = "tokens", "rows"
"""Denominator of the loss: a global batch's supervised tokens, or its rows (sequences, if packed)."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of one flattened row begin and end; varlen attention uses this instead of a mask."""

    boundaries: torch.Tensor
    """int32 ``[sequences + 1]``: sequence ``i`` is ``[boundaries[i], boundaries[i + 1])``; the last may repeat."""
    max_length: int
    """Upper bound on the length of a sequence."""


def learned_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions of labels that are learned: int64 ``[targets]``, indices into the flattened labels."""
    return (labels != IGNORE).flatten().nonzero().flatten()


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions whose next token is learned: int64 ``[targets]``, indices into the flattened labels.

    The size of the result depends on the values; on the CPU, where batches are built, this needs no device sync.

    Args:
        labels: int64 ``[rows, length]``, -100 where not learned.
    """
    learned = labels != IGNORE
    learned[:, 0] = False  # no token of the row precedes it
    return learned.flatten().nonzero().flatten() - 1
