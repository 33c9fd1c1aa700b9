"""How long a run is: a given number of steps, or of rows.

If rows decide (``train.num_epochs``), progress is not counted in steps: after a resume with another global batch size,
or after skipped batches, all remaining rows are still trained on, and the learning rate follows the position in the
rows.
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
    """Optimizer steps after which the run ends; 0 = rows decide."""
    last_position: int = 0
    """Rows after which the run ends, if rows decide."""

    @property
    def planned_steps(self) -> int:
        """Steps from the first row to the last, all with this batch size."""
        return self.max_steps or math.ceil(self.last_position / self.rows_per_step)

    def total_steps(self, progress: Progress) -> int:
        """Return how many steps the run will have made when it ends, given what is left."""
        if self.max_steps:
            return self.max_steps
        return progress.step + math.ceil(max(0, self.last_position - progress.position) / self.rows_per_step)

    def reached(self, progress: Progress) -> bool:
        """Whether nothing is left to train on."""
        return progress.step >= self.max_steps if self.max_steps else progress.position >= self.last_position

    def scheduled(self, progress: Progress) -> float:
        """Return the position in the schedule, out of `planned_steps`: with a constant batch size, the steps made.

        If rows decide, the position is derived from rows, so changing the batch size does not move it.
        """
        return progress.step if self.max_steps else progress.position / self.rows_per_step
