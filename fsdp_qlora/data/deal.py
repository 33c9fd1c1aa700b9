"""How a global batch is split into micro-batches and distributed to the ranks.

The content of each micro-batch does not depend on the number of ranks; micro-batch ``i`` goes to rank
``i % num_ranks``. If they do not divide evenly, the last ranks run micro-batches of weight zero, so that every rank
takes part in every collective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of a step are split over micro-batches and ranks."""

    global_batch_size: int
    micro_batch_size: int
    num_ranks: int

    def of_rows(self, rows: int) -> BatchPlan:
        """Return the same with micro-batches of ``rows``, and at least one of them for each rank."""
        return replace(
            self, micro_batch_size=rows, global_batch_size=max(rows * self.num_ranks, self.global_batch_size)
        )

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in a full global batch, over all ranks."""
        return ceil(self.global_batch_size / self.micro_batch_size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each rank runs per optimizer step, including those of weight zero."""
        return ceil(self.num_micro_batches / self.num_ranks)


def deal(num_items: int, rank: int, num_ranks: int) -> list[int | None]:
    """Return the indices of the items for ``rank``, with None for a micro-batch of weight zero.

    The lists of all ranks have the same length, at least 1.
    """
    rounds = max(1, ceil(num_items / num_ranks))
    numbers = [turn * num_ranks + rank for turn in range(rounds)]
    return [number if number < num_items else None for number in numbers]


def num_steps(max_steps: int, num_epochs: float, num_rows: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps: ``max_steps`` if positive, else those of ``num_epochs`` epochs."""
    if max_steps > 0:
        return max_steps
    return max(1, ceil(round(num_epochs * num_rows) / global_batch_size))
