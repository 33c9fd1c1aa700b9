"""How long a run is: as many steps as were asked for, or as many rows.

Where rows decide (``train.num_epochs``), nothing here is remembered in steps: after a resume with another global batch,
or after batches that were left out, the rows that remain are still all trained on, and the learning rate is where the
rows are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fsdp_qlora.train.progress import Progress


@dataclass(frozen=True)
class Length:
    """When a run ends."""

    rows_per_step: int
    """Rows of a full global batch."""
    max_steps: int = 0
    """Optimizer steps after which it ends; 0 = rows decide."""
    last_position: int = 0
    """Rows after which it ends, where rows decide."""

    @property
    def planned_steps(self) -> int:
        """Steps of a run from its first row to its last, all with this batch."""
        return self.max_steps or math.ceil(self.last_position / self.rows_per_step)

    def total_steps(self, progress: Progress) -> int:
        """Return how many steps the run will have made at its end, going by what is left."""
        if self.max_steps:
            return self.max_steps
        return progress.step + math.ceil(max(0, self.last_position - progress.position) / self.rows_per_step)

    def reached(self, progress: Progress) -> bool:
        """Whether nothing is left to train on."""
        return progress.step >= self.max_steps if self.max_steps else progress.position >= self.last_position

    def scheduled(self, progress: Progress) -> float:
        """Return the place in the schedule, in steps of `planned_steps`: with one batch size, the steps made so far.

        Where rows decide it is counted in rows, so a change of the batch moves it by nothing.
        """
        return progress.step if self.max_steps else progress.position / self.rows_per_step
