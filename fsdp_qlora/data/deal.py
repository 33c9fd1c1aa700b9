"""How a global batch is cut into micro-batches and dealt to the ranks: the same for any number of ranks.

A step's global batch is cut into numbered micro-batches of fixed content; micro-batch ``i`` goes to rank
``i % num_ranks``. When they do not divide, the last ranks run micro-batches of weight zero, so that every rank takes
part in every collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class BatchPlan:
    """Rows of a step over micro-batches and ranks."""

    global_batch_size: int
    micro_batch_size: int
    num_ranks: int

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a full global batch, over all ranks."""
        return ceil(self.global_batch_size / self.micro_batch_size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each rank runs per optimizer step, those of weight zero included."""
        return ceil(self.num_micro_batches / self.num_ranks)


def deal(num_items: int, rank: int, num_ranks: int) -> list[int | None]:
    """Return the numbers of the items that ``rank`` works on; None where it runs one of weight zero.

    All ranks get lists of the same length, at least 1.
    """
    rounds = max(1, ceil(num_items / num_ranks))
    numbers = [turn * num_ranks + rank for turn in range(rounds)]
    return [number if number < num_items else None for number in numbers]


def num_steps(max_steps: int, num_epochs: float, num_rows: int, global_batch_size: int) -> int:
    """Return the optimizer steps of a run: ``max_steps`` if given, else what ``num_epochs`` passes take."""
    if max_steps > 0:
        return max_steps
    return max(1, ceil(round(num_epochs * num_rows) / global_batch_size))
