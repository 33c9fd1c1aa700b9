"""The next global batch is built in a thread while this one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fsdp_qlora.data.loader import Batch


class Ahead:
    """A loader's ``batch_at`` that has the following batch ready when it is asked for in order.

    What goes wrong in the thread is raised where that batch is asked for. Any other position is built on the spot.
    """

    def __init__(self, batch_at: Callable[[int], Batch], end: float) -> None:
        self._batch_at, self._end = batch_at, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, position: int) -> Batch:
        """Return the batch at ``position`` and start on the one after it."""
        expected, self._next = self._next, None
        if expected is not None and expected[0] == position:
            batch = expected[1].result()
        else:
            batch = self._pool.submit(self._batch_at, position).result()  # one thread: a loader has state
        after = position + batch.num_rows
        if after < self._end:
            self._next = (after, self._pool.submit(self._batch_at, after))
        return batch

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
