"""Builds the next global batch in a background thread while the current one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fsdp_qlora.data.loader import Batch


class Ahead:
    """Wraps a loader's ``batch_at`` and prefetches the following batch.

    An error in the thread is raised when that batch is requested. If another position is requested, the prefetched
    batch is dropped and the requested one is built on the spot.
    """

    def __init__(self, batch_at: Callable[[int], Batch], end: float) -> None:
        self._batch_at, self._end = batch_at, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, position: int) -> Batch:
        """Return the batch at ``position`` and start building the one after it."""
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
        """Shut the thread down."""
        self._pool.shutdown(wait=False, cancel_futures=True)
