"""Streams training rows from their sources, for data that does not fit on disk: nothing is stored or counted ahead.

Position ``p`` counts rows in the order of the sources, pass after pass. Rows ``[w * W, (w + 1) * W)`` form window
``w``, shuffled by a permutation that depends only on (seed, w). So the order is the same on any number of ranks, and a
resume reads up to its position without tokenizing. Every rank reads the sources and tokenizes whole global batches,
because all ranks must cut them in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from fsdp_qlora.data.encoder import Counts
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Batch, Cut, Rows, TokenRows, build_batch
from fsdp_qlora.data.sources import read_source
from fsdp_qlora.data.tokens import Fit, ReadRow, encoded_rows, fit_row
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbered = tuple[int, Row]
"""The index of a row's source, and the row."""


@dataclass(frozen=True)
class Stream:
    """The sources to read, their shares, and how to tokenize their rows."""

    sources: list[str]
    weights: Sequence[float] | None
    """Shares of the sources; None reads one source after the other."""
    window: int
    """Number of rows that are shuffled together."""
    seed: int
    read: ReadRow
    tokenizer: PreTrainedTokenizerBase
    fit: Fit
    skip_bad: bool

    def rows(self) -> Iterator[Numbered]:
        """Yield rows forever; an exhausted source starts again."""
        if self.weights is None:
            while True:
                for number in range(len(self.sources)):
                    yield from self._source(number)
        weights = np.array(self.weights, dtype=np.float64) / sum(self.weights)
        taken = np.zeros(len(weights), dtype=np.int64)
        own = [self._forever(number) for number in range(len(weights))]
        while True:  # take the source furthest behind its share: exact to one row at any position
            number = int(np.argmax(weights * (taken.sum() + 1) - taken))
            taken[number] += 1
            yield next(own[number])

    def _source(self, number: int) -> Iterator[Numbered]:
        for row in read_source(self.sources[number]):
            yield number, row

    def _forever(self, number: int) -> Iterator[Numbered]:
        while True:
            yield from self._source(number)

    def tokenize(self, rows: Sequence[Numbered], bad: Callable[[str, DataError], None] | None = None) -> TokenRows:
        """Tokenize ``rows``, keeping those with something to learn; ``bad`` receives the bad rows that are skipped.

        Raises:
            DataError: for a bad row unless ``skip_bad``, naming its file and line.
        """
        from datasets import Dataset

        columns: dict[str, list] = {"input_ids": [], "learned": [], "source": []}
        for number, where, _, outcome in encoded_rows(list(rows), self.read, self.tokenizer, self.fit.train_on):
            if isinstance(outcome, DataError):
                if not self.skip_bad:
                    raise DataError(f"data: {where}: {outcome}. (Set data.on_bad_row=skip to skip such rows.)")
                if bad is not None:
                    bad(where, outcome)
                continue
            for ids, learned in fit_row(outcome, self.fit, Counts()):
                columns["input_ids"].append(ids)
                columns["learned"].append(learned)
                columns["source"].append(number)
        return TokenRows(Dataset.from_dict(columns))


class StreamLoader:
    """Builds this rank's part of each global batch of a stream; as in `Loader`, the position is the whole state."""

    def __init__(
        self, stream: Stream, global_batch_size: int, cut: Cut, lay_out: Callable[[TokenRows], Rows],
        bad: Callable[[str, DataError], None],
    ) -> None:  # fmt: skip
        self.stream, self.global_batch_size, self.cut, self.lay_out = stream, global_batch_size, cut, lay_out
        self._bad = bad
        self._rows = stream.rows()
        self._next = 0  # index of the window that `_rows` yields next
        self._window = lru_cache(maxsize=2)(self._read)

    def _read(self, number: int) -> list[Numbered]:
        size = self.stream.window
        if number < self._next:
            self._rows, self._next = self.stream.rows(), 0
        for _ in islice(self._rows, (number - self._next) * size):
            pass  # skip to the window, after a resume or a step back
        self._next = number + 1
        rows = list(islice(self._rows, size))
        order = np.random.Generator(np.random.PCG64([self.stream.seed, number])).permutation(size)
        return [rows[i] for i in order]

    def rows_at(self, position: int) -> list[Numbered]:
        """Return the rows of the global batch that starts at ``position``."""
        size = self.stream.window
        return [self._window(p // size)[p % size] for p in range(position, position + self.global_batch_size)]

    def batch_at(self, position: int, limit: int | None = None) -> Batch:
        """Return this rank's part of the global batch at ``position``; rows with nothing to learn are dropped."""
        assert limit is None, "a stream has no last row"
        chosen = self.rows_at(position)
        rows = self.lay_out(self.stream.tokenize(chosen, self._bad))
        if len(rows) == 0:
            raise DataError(
                f"data: none of the {len(chosen)} rows of a global batch ({chosen[0][1].where} and others) has a "
                "supervised token to learn from."
            )
        batch = build_batch(rows, list(range(len(rows))), self.cut)
        return replace(batch, num_rows=self.global_batch_size)
