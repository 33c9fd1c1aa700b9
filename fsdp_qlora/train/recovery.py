"""After a bad step (a loss or gradient that is not finite, or a spike): say where, then stop, skip or roll back.

The update was not made when this is called. What it decides depends on numbers that are equal on every rank, so all
ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fsdp_qlora.data.loader import Batch, MicroBatch
from fsdp_qlora.errors import NonFiniteError
from fsdp_qlora.train.progress import Progress


class Rewindable(Protocol):
    """A tracker that can forget the steps after one."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Take the values of a step."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what was logged of later steps."""
        ...


@dataclass
class Recovery:
    """What to do about bad steps (``train.on_nonfinite``)."""

    policy: Literal["stop", "skip", "rollback"]
    max_bad_steps: int
    locate: Callable[[Sequence[MicroBatch], int], str]
    """(this rank's micro-batches, step) -> which ranks, rows and modules; every rank calls it."""
    drop_gradients: Callable[[], None]
    restore: Callable[[], None]
    """Load the newest checkpoint, progress included."""
    in_a_row: int = 0

    def __call__(self, error: NonFiniteError, batch: Batch, progress: Progress, tracker: Rewindable) -> None:
        """Recover as the policy says, with ``progress`` behind the bad batch.

        Raises:
            NonFiniteError: where the policy is to stop, or there were too many bad steps in a row.
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
