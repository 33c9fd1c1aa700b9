"""Packs several rows into one sequence: best-fit-decreasing bins, restarting positions, labels within each row.

The attention backend keeps attention within a row. A backend with a dense mask uses the restarting positions
(transformers' packed format); a varlen backend (flash attention) uses boundaries and gets its micro-batch as one flat
row (`FlatRows`), because transformers would treat each of several rows as a single sequence.
`fsdp_qlora.checks.isolation` verifies at start-up that rows are kept apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from fsdp_qlora.data.forms import repeat_last, rounded
from fsdp_qlora.data.labels import IGNORE, Sequences
from fsdp_qlora.data.loader import Piece, Rows, TokenBatch, TokenRows, idle_tokens


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins with best-fit-decreasing; return the item indices of each bin.

    Items are placed longest first, each into the fullest bin that still has room (Johnson 1973: at most 11/9 of the
    optimum + 6/9). Ties are broken by index, so the result depends only on the lengths.

    Raises:
        ValueError: if an item is longer than ``capacity``.
    """
    bins: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free space -> bins with exactly that much
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
    """Sequences packed from several rows each; the loader treats them as rows."""

    def __init__(self, rows: TokenRows, capacity: int, step: int = 1) -> None:
        """Pack sequences of at most ``capacity`` tokens; widths are rounded up to a multiple of ``step``."""
        self.rows, self.capacity, self.step = rows, capacity, step
        self.bins = best_fit_decreasing(rows.lengths, capacity)
        self.lengths = np.array([rows.lengths[b].sum() for b in self.bins], dtype=np.int64)
        self.targets = np.array([rows.targets[b].sum() for b in self.bins], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def efficiency(self) -> float:
        """Fraction of the sequences' capacity that is filled with tokens."""
        return float(self.lengths.sum()) / (len(self.bins) * self.capacity)

    def room(self, rows: list[int]) -> int:
        """Return the number of tokens of the sequences as `collate` lays them out, including padding."""
        return len(rows) * rounded(int(self.lengths[rows].max()), self.capacity, self.step)

    def pieces(self, rows: list[int]) -> list[list[Piece]]:
        """Return the rows in each chosen sequence."""
        return [[self.rows.row(row) for row in self.bins[b]] for b in rows]

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return the indices of the rows in the chosen sequences."""
        return tuple(row for b in rows for row in self.bins[b])

    def collate(self, rows: list[int], number: int, position: int = 0) -> TokenBatch:
        """Concatenate the rows of each chosen sequence and pad to the longest sequence, rounded up."""
        width = rounded(int(self.lengths[rows].max()), self.capacity, self.step)
        return pack(self.pieces(rows), number, self.numbers(rows), width)

    def idle(self) -> TokenBatch:
        """Return a micro-batch of weight zero."""
        return idle_tokens()


class FlatRows:
    """Rows, or packed sequences, concatenated into one row per micro-batch, so nothing is padded to the longest.

    With ``varlen`` the micro-batch records where each row begins, which varlen attention uses to keep all rows apart,
    including those of different sequences. Without it, attention uses the restarting positions.
    """

    def __init__(self, rows: Rows, max_length: int = 0, step: int = 1, varlen: bool = False) -> None:
        """Flatten ``rows`` to a multiple of ``step`` tokens; for ``max_length`` see `with_boundaries`."""
        self.rows, self.lengths, self.targets = rows, rows.lengths, rows.targets
        self.max_length, self.step, self.varlen = max_length, step, varlen

    def __len__(self) -> int:
        return len(self.rows)

    def room(self, rows: list[int]) -> int:
        """Return the number of tokens of the rows, rounded up."""
        return -(-int(self.lengths[rows].sum()) // self.step) * self.step

    def pieces(self, rows: list[int]) -> list[list[Piece]]:
        """Return all chosen rows as one sequence."""
        return [[piece for pieces in self.rows.pieces(rows) for piece in pieces]]

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return the indices in the prepared data of these rows."""
        return self.rows.numbers(rows)

    def collate(self, rows: list[int], number: int, position: int = 0) -> TokenBatch:
        """Concatenate the chosen rows."""
        return flat_batch(self.pieces(rows), self.max_length, self.step, self.varlen, number, self.numbers(rows))

    def idle(self) -> TokenBatch:
        """Return a micro-batch of weight zero."""
        return idle_tokens()


def flat_batch(
    sequences: Iterable[Iterable[Piece]], max_length: int, step: int, varlen: bool, number: int = 0,
    rows: tuple[int, ...] = (),
) -> TokenBatch:  # fmt: skip
    """Concatenate the rows of ``sequences``; see `FlatRows`."""
    pieces = [piece for pieces in sequences for piece in pieces]
    tokens = sum(len(ids) for ids, _ in pieces)
    flat = pack([pieces], number, rows, -(-tokens // step) * step)
    return with_boundaries(flat, max_length) if varlen else flat


def with_boundaries(flat: TokenBatch, max_length: int) -> TokenBatch:
    """Add the boundaries of the rows in a micro-batch of one flat row; padding counts as further rows at the end.

    Compiled layers treat `Sequences.max_length` as a constant, so it is always ``max_length`` unless a row is longer.
    """
    assert flat.position_ids is not None and len(flat.position_ids) == 1
    positions = flat.position_ids[0]
    starts = (positions == 0).nonzero().flatten()
    boundaries = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
    longest = max(max_length, int(positions.max()) + 1)
    return replace(flat, sequences=Sequences(repeat_last(boundaries), longest))


def pack(
    sequences: Iterable[Iterable[Piece]], number: int = 0, rows: tuple[int, ...] = (), width: int = 2
) -> TokenBatch:
    """Return a micro-batch of sequences made of rows, ``width`` tokens wide or as wide as the longest if that is more.

    Padding forms separate pieces at the end, so that it attends to no row. No such piece is longer than the longest
    row, because the model's positions may end there. A row's first token is not learned: no token of its row predicts
    it.
    """
    sequences = [list(pieces) for pieces in sequences]
    width = max(2, width, *(sum(len(ids) for ids, _ in pieces) for pieces in sequences))
    longest = max(1, *(len(ids) for pieces in sequences for ids, _ in pieces))
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
        position_ids[line, start:] = torch.arange(width - start) % longest
    return TokenBatch(number, input_ids, labels, rows=rows, position_ids=position_ids)
