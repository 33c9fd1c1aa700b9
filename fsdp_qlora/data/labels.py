"""Which tokens are learned, and where the sequences of a row begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


IGNORE = -100
"""Label of a token that is not learned (torch's ``ignore_index``)."""
TOKENS, ROWS = "tokens", "rows"
"""What losses are divided by: a global batch's supervised tokens, or its rows (packed: sequences)."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of one flattened row begin and end: what varlen attention reads instead of a mask."""

    boundaries: torch.Tensor
    """int32 ``[sequences + 1]``: sequence ``i`` is ``[boundaries[i], boundaries[i + 1])``; the last may repeat."""
    max_length: int
    """No sequence is longer."""


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions whose next token is learned: int64 ``[targets]``, numbers into the flattened labels.

    How many there are is only known from the values; on the CPU, where batches are made, no device is waited for.

    Args:
        labels: int64 ``[rows, length]``, -100 where not learned.
    """
    learned = labels != IGNORE
    learned[:, 0] = False  # no token of its row comes before it
    return learned.flatten().nonzero().flatten() - 1
