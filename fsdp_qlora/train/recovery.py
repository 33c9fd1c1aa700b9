"""After a bad step (a non-finite loss or gradient, or a loss spike): locate it, then stop, skip or roll back.

It is called before the update. Its decision depends only on numbers that are equal on every rank, so all ranks make the
same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.data.loader import Batch, MicroBatch
from fsdp_qlora.errors import NonFiniteError
from fsdp_qlora.track.tracker import Tracker
from fsdp_qlora.train.progress import Progress


@dataclass
class Recovery:
    """Handles bad steps according to ``train.on_nonfinite``."""

    policy: Literal["stop", "skip", "rollback"]
    max_bad_steps: int
    locate: Callable[[Sequence[MicroBatch], int], str]
    """(this rank's micro-batches, step) -> which ranks, rows and modules are affected. A collective."""
    drop_gradients: Callable[[], None]
    restore: Callable[[], None]
    """Load the newest checkpoint, including its progress."""
    in_a_row: int = 0

    def __call__(self, error: NonFiniteError, batch: Batch, progress: Progress, tracker: Tracker) -> None:
        """Apply the policy and move ``progress`` past the bad batch.

        Raises:
            NonFiniteError: if the policy is to stop, or there were too many bad steps in a row.
        """
        where = self.locate(batch.micro_batches, progress.step + 1)
        self.in_a_row += 1
        if self.policy == "stop" or self.in_a_row >= self.max_bad_steps:
            count = f" This was bad step {self.in_a_row} in a row." if self.in_a_row > 1 else ""
            raise type(error)(f"{error} {where}{count}") from error
        self.drop_gradients()
        bad, first, after = progress.step + 1, progress.position, progress.position + batch.num_rows
        if self.policy == "rollback":
            self.restore()
            first = progress.position
            tracker.rewind(progress.step)
        progress.position = after
        progress.rows_left_out += after - first
        told = {"bad_step": bad, "left_out": [first, after], "reason": f"{error} {where}"}
        tracker.log(progress.step, told)

    def went_well(self) -> None:
        """Note a good step."""
        self.in_a_row = 0
