"""Batches for one rank. The order is a pure function of (seed, epoch, position); the whole state is one integer.

Position counts rows since the start over all ranks. Position ``p`` is row ``p % n`` of epoch ``p // n``'s permutation:
each row comes exactly once an epoch for any number of ranks, and a resume at any position needs no replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from fsdp_qlora.data.deal import deal
from fsdp_qlora.data.labels import IGNORE, ROWS, TOKENS, Sequences, supervised_positions

if TYPE_CHECKING:
    from datasets import Dataset


_WINDOW_BATCHES = 50
"""Global batches in a window of rows that length grouping sorts."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model at once."""

    number: int
    """Number within the global batch, the same on any number of ranks: seeds dropout."""
    input_ids: torch.Tensor
    """int64 ``[rows, length]``, padded on the right."""
    labels: torch.Tensor
    """int64 ``[rows, length]``, -100 where not learned."""
    weight: float = 1.0
    """0 for a micro-batch that only keeps this rank in step with the others."""
    rows: tuple[int, ...] = ()
    """Numbers of the rows in the prepared data."""
    position_ids: torch.Tensor | None = None
    """int64 ``[rows, length]``, starting anew at each packed row; None where a sequence is one row."""
    sequences: Sequences | None = None
    """Where all is one row for varlen attention (`FlatRows`): where each packed or plain row begins and ends."""
    rare: bool = False
    """Whether its form comes too rarely for layers to be compiled for it (`fsdp_qlora.data.forms`)."""
    supervised: torch.Tensor = field(init=False)
    """int64 ``[targets]``: positions of the flattened labels whose next token is learned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "supervised", supervised_positions(self.labels))


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, and the totals over all ranks."""

    micro_batches: list[MicroBatch]
    num_rows: int
    num_tokens: int
    """Tokens without padding, over all ranks."""
    weights: dict[str, int]
    """What losses are divided by, over all ranks: `TOKENS` that are supervised, `ROWS`."""


Piece = tuple[torch.Tensor, torch.Tensor]
"""A row's token ids (int64) and whether each is learned (bool), both ``[length]``."""


class Rows(Protocol):
    """What batches are made of: rows, or sequences of several rows."""

    lengths: np.ndarray
    """int64, tokens of each."""
    targets: np.ndarray
    """int64, supervised tokens of each."""

    def __len__(self) -> int: ...

    def room(self, rows: list[int]) -> int:
        """Return the tokens that the chosen ones take in a micro-batch, padding included."""
        ...

    def pieces(self, rows: list[int]) -> list[list[Piece]]:
        """Return the rows that each of the chosen ones is made of."""
        ...

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return the numbers of these rows in the prepared data."""
        ...

    def collate(self, rows: list[int], number: int) -> MicroBatch:
        """Return the chosen ones as micro-batch ``number``."""
        ...


class TokenRows:
    """Tokenized rows with their lengths and numbers of targets."""

    def __init__(self, data: Dataset) -> None:
        self._data = data.with_format("numpy")
        self.sources = np.array(data["source"], dtype=np.int64)
        """Number of the source that each row came from."""
        self.lengths = np.array([len(ids) for ids in self._column("input_ids")], dtype=np.int64)
        self.targets = np.array([int(mask[1:].sum()) for mask in self._column("learned")], dtype=np.int64)

    def _column(self, name: str) -> Iterator[np.ndarray]:
        for part in self._data.select_columns([name]).iter(batch_size=1024):
            yield from cast(dict[str, Any], part)[name]

    def __len__(self) -> int:
        return len(self.lengths)

    def largest_token(self) -> int:
        """Return the largest token id of all rows; it reads them all."""
        return max((int(ids.max()) for ids in self._column("input_ids")), default=0)

    def row(self, number: int) -> Piece:
        """Return a row."""
        item = self._data[number]
        ids = torch.as_tensor(np.asarray(item["input_ids"], dtype=np.int64))
        return ids, torch.as_tensor(np.asarray(item["learned"], dtype=bool))

    def room(self, rows: list[int]) -> int:
        """Return the tokens of ``rows`` as `collate` lays them out."""
        return len(rows) * int(self.lengths[rows].max())

    def pieces(self, rows: list[int]) -> list[list[Piece]]:
        """Return each row alone."""
        return [[self.row(row)] for row in rows]

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return ``rows``."""
        return tuple(rows)

    def collate(self, rows: list[int], number: int) -> MicroBatch:
        """Pad ``rows`` to the longest of them."""
        width = max(2, int(self.lengths[rows].max()))
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
        for line, row in enumerate(rows):
            ids, learned = self.row(row)
            input_ids[line, : len(ids)] = ids
            labels[line, : len(ids)] = torch.where(learned, ids, IGNORE)
        return MicroBatch(number, input_ids, labels, rows=tuple(rows))


def idle_micro_batch() -> MicroBatch:
    """Return the smallest micro-batch, of weight zero: its rank takes part in every collective and adds nothing."""
    nothing = torch.zeros(1, 2, dtype=torch.int64)
    return MicroBatch(-1, nothing, nothing.clone(), weight=0.0, rare=True)


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut into micro-batches, and which rank takes its part here."""

    micro_batch_size: int
    """Rows of a micro-batch."""
    rank: int
    num_ranks: int
    micro_batch_tokens: int = 0
    """Instead of a number of rows: tokens that a micro-batch may take, padding included; 0 = not used."""

    def pieces(self, rows: Rows, chosen: list[int]) -> list[list[int]]:
        """Cut ``chosen``, rows of like length together; a row above the budget is alone."""
        ordered = sorted(chosen, key=lambda row: (int(rows.lengths[row]), row))
        if not self.micro_batch_tokens:
            size = self.micro_batch_size
            return [ordered[i : i + size] for i in range(0, len(ordered), size)]
        found: list[list[int]] = []
        for row in ordered:
            if found and rows.room([*found[-1], row]) <= self.micro_batch_tokens:
                found[-1].append(row)
            else:
                found.append([row])
        return found


class Loader:
    """Global batches of training rows, this rank's part of each."""

    def __init__(self, rows: Rows, global_batch_size: int, cut: Cut, seed: int, length_grouped: bool = False) -> None:
        self.rows, self.global_batch_size, self.cut = rows, global_batch_size, cut
        self.seed, self.length_grouped = seed, length_grouped
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = random.permutation(len(self.rows))
        return self._grouped(order, random) if self.length_grouped else order

    def _grouped(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sort windows of shuffled rows by length, cut them into global batches, shuffle these within the window."""
        size = self.global_batch_size
        parts = []
        for start in range(0, len(order), size * _WINDOW_BATCHES):
            window = order[start : start + size * _WINDOW_BATCHES]
            window = window[np.argsort(-self.rows.lengths[window], kind="stable")]
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            full = [b for b in batches if len(b) == size]
            parts += [full[i] for i in random.permutation(len(full))] + batches[len(full) :]
        return np.concatenate(parts) if parts else order

    def indices(self, position: int, count: int) -> list[int]:
        """Return the row numbers at positions ``[position, position + count)``."""
        size = len(self.rows)
        return [int(self._order(p // size)[p % size]) for p in range(position, position + count)]

    def batch_at(self, position: int, limit: int | None = None) -> Batch:
        """Return the global batch that starts at ``position``; it ends before ``limit``, if there is one."""
        count = self.global_batch_size if limit is None else min(self.global_batch_size, limit - position)
        chosen = self.indices(position, count)
        return build_batch(self.rows, chosen, self.cut)


def build_batch(rows: Rows, chosen: list[int], cut: Cut) -> Batch:
    """Cut rows into micro-batches and take this rank's."""
    pieces = cut.pieces(rows, chosen)
    return Batch(
        [
            idle_micro_batch() if number is None else rows.collate(pieces[number], number)
            for number in deal(len(pieces), cut.rank, cut.num_ranks)
        ],
        num_rows=len(chosen),
        num_tokens=int(rows.lengths[chosen].sum()),
        weights={TOKENS: int(rows.targets[chosen].sum()), ROWS: len(chosen)},
    )
