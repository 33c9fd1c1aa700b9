"""Several rows in one sequence: best-fit-decreasing bins, positions that restart, labels that do not cross over.

Attention is kept inside a row by the attention backend, which reads the restarting positions (transformers' packed
format); `fsdp_qlora.model.isolation` proves at start-up that it does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from fsdp_qlora.data.loader import MicroBatch, TokenRows
from fsdp_qlora.plan.batch import IGNORE


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Put items into as few bins as best-fit-decreasing finds; return the item numbers of each bin.

    The longest items go first, each into the fullest bin that still has room (Johnson 1973: at most 11/9 of the
    optimum + 6/9). Ties go by number, so the result depends on the lengths alone.

    Raises:
        ValueError: if an item is longer than ``capacity``.
    """
    bins: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free space -> bins that have just that
    spaces: list[int] = []  # the keys of `room`, sorted
    for item in sorted(range(len(lengths)), key=lambda number: (-int(lengths[number]), number)):
        length = int(lengths[item])
        if length > capacity:
            raise ValueError(f"item {item} has length {length}, more than {capacity}")
        place = bisect_left(spaces, length)
        if place == len(spaces):
            bins.append([item])
            target, left = len(bins) - 1, capacity - length
        else:
            space = spaces[place]
            target, left = room[space].pop(), space - length
            if not room[space]:
                del room[space], spaces[place]
            bins[target].append(item)
        if left not in room:
            room[left] = []
            insort(spaces, left)
        room[left].append(target)
    return bins


class PackedRows:
    """Sequences of several rows each; to the loader they are rows."""

    def __init__(self, rows: TokenRows, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.bins = best_fit_decreasing(rows.lengths, capacity)
        self.lengths = np.array([rows.lengths[b].sum() for b in self.bins], dtype=np.int64)
        self.targets = np.array([rows.targets[b].sum() for b in self.bins], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def efficiency(self) -> float:
        """Share of the sequences' room that holds tokens."""
        return float(self.lengths.sum()) / (len(self.bins) * self.capacity)

    def room(self, rows: list[int]) -> int:
        """Return the tokens of the sequences as `collate` lays them out."""
        return len(rows) * int(self.lengths[rows].max())

    def collate(self, rows: list[int], number: int) -> MicroBatch:
        """Lay the rows of each chosen sequence end to end; pad to the longest sequence."""
        pieces = [[self.rows.row(row) for row in self.bins[b]] for b in rows]
        return pack(pieces, number, tuple(row for b in rows for row in self.bins[b]))


class PaddingFreeRows:
    """Rows whose micro-batches are one sequence each: end to end, nothing padded."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows, self.lengths, self.targets = rows, rows.lengths, rows.targets

    def __len__(self) -> int:
        return len(self.rows)

    def room(self, rows: list[int]) -> int:
        """Return the tokens of the rows, nothing added."""
        return int(self.lengths[rows].sum())

    def collate(self, rows: list[int], number: int) -> MicroBatch:
        """Lay the chosen rows end to end."""
        return pack([[self.rows.row(row) for row in rows]], number, tuple(rows))


def pack(
    sequences: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], number: int = 0, rows: tuple[int, ...] = ()
) -> MicroBatch:
    """Return a micro-batch of sequences that are made of ``(ids, learned)`` rows (int64 and bool, ``[length]``).

    Padding is a piece of its own at the end, so that it looks at no row. A row's first token has nothing before it that
    may predict it, and is not learned.
    """
    width = max(2, *(sum(len(ids) for ids, _ in pieces) for pieces in sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    labels = torch.full((len(sequences), width), IGNORE, dtype=torch.int64)
    position_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    for line, pieces in enumerate(sequences):
        start = 0
        for ids, learned in pieces:
            stop = start + len(ids)
            input_ids[line, start:stop] = ids
            labels[line, start + 1 : stop] = torch.where(learned, ids, IGNORE)[1:]
            position_ids[line, start:stop] = torch.arange(len(ids))
            start = stop
        position_ids[line, start:] = torch.arange(width - start)
    return MicroBatch(number, input_ids, labels, rows=rows, position_ids=position_ids)
