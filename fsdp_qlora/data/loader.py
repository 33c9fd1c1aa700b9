"""Batches for one rank. The order is a pure function of the seed and the position; the whole state is one integer.

The position counts rows since the start over all ranks. Position ``p`` is entry ``p % n`` of the permutation of epoch
``p // n``: each row occurs once per epoch for any number of ranks, and a resume at any position needs no replay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, Self, cast, runtime_checkable

import numpy as np
import torch

from fsdp_qlora.data.deal import deal
from fsdp_qlora.data.labels import IGNORE, ROWS, TOKENS, Sequences, supervised_positions

if TYPE_CHECKING:
    from datasets import Dataset


_WINDOW_BATCHES = 50
"""Number of global batches per window; length grouping sorts rows within a window."""


@dataclass(frozen=True)
class MicroBatch(ABC):
    """Rows that go through the model together."""

    number: int
    """Index within the global batch, independent of the number of ranks; seeds dropout."""
    weight: float = field(default=1.0, kw_only=True)
    """0 for a micro-batch that only keeps this rank in step with the others."""
    rows: tuple[int, ...] = field(default=(), kw_only=True)
    """Indices of the rows in the prepared data."""

    def to(self, device: torch.device) -> Self:
        """Return the micro-batch on a device; copies from pinned memory are asynchronous."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """Return the micro-batch in pinned host memory."""
        return self._with(lambda tensor: tensor.pin_memory())

    @abstractmethod
    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Return a copy with ``change`` applied to all tensors."""


@dataclass(frozen=True)
class TokenBatch(MicroBatch):
    """Rows of a causal language model, which learns supervised tokens from those before them."""

    input_ids: torch.Tensor
    """int64 ``[rows, length]``, padded on the right."""
    labels: torch.Tensor
    """int64 ``[rows, length]``, -100 where not learned."""
    position_ids: torch.Tensor | None = field(default=None, kw_only=True)
    """int64 ``[rows, length]``, restarting at each packed row; None if each sequence is a single row."""
    sequences: Sequences | None = field(default=None, kw_only=True)
    """With varlen attention (`FlatRows`), where each original row begins and ends in the single flat row; else None."""
    rare: bool = field(default=False, kw_only=True)
    """Whether its form is too rare to compile layers for it (`fsdp_qlora.data.forms`)."""
    supervised: torch.Tensor = field(init=False)
    """int64 ``[targets]``: positions in the flattened labels whose next token is learned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "supervised", supervised_positions(self.labels))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        changed = copy(self)  # not `replace`, which would look for the supervised positions again
        for name in ("input_ids", "labels", "position_ids", "supervised"):
            if (tensor := getattr(self, name)) is not None:
                object.__setattr__(changed, name, change(tensor))
        if self.sequences is not None:
            moved = replace(self.sequences, boundaries=change(self.sequences.boundaries))
            object.__setattr__(changed, "sequences", moved)
        return changed


@dataclass(frozen=True)
class NamedBatch(MicroBatch):
    """Rows of any other model: its inputs and what the objective compares its outputs with, by name."""

    tensors: Mapping[str, torch.Tensor]

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, and the totals over all ranks."""

    micro_batches: list[MicroBatch]
    num_rows: int
    num_tokens: int
    """Tokens without padding, over all ranks."""
    weights: dict[str, int]
    """Denominators of the loss, over all ranks: supervised `TOKENS`, and `ROWS`."""


Piece = tuple[torch.Tensor, torch.Tensor]
"""A row's token ids (int64) and whether each is learned (bool), both ``[length]``."""


class Rows(Protocol):
    """The items that batches are made of: single rows, or sequences packed from several rows."""

    lengths: np.ndarray
    """int64, number of tokens of each item."""
    targets: np.ndarray
    """int64, number of supervised tokens of each item."""

    def __len__(self) -> int: ...

    def room(self, rows: list[int]) -> int:
        """Return the number of tokens that the chosen items take in a micro-batch, including padding."""
        ...

    def pieces(self, rows: list[int]) -> list[list[Piece]]:
        """Return, for each sequence of the micro-batch, the rows that it is made of."""
        ...

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return the indices in the prepared data of the rows in the chosen items."""
        ...

    def collate(self, rows: list[int], number: int, position: int = 0) -> MicroBatch:
        """Return the chosen items as micro-batch ``number`` of the global batch at ``position``."""
        ...

    def idle(self) -> MicroBatch:
        """Return a minimal micro-batch of weight zero: its rank must join collectives, but has nothing to add."""
        ...


class StoredRows(Rows, Protocol):
    """Rows as they are stored, each alone."""

    sources: np.ndarray
    """int64, index of each row's source."""


@runtime_checkable
class DrawnTargets(Protocol):
    """Rows whose number of supervised tokens is drawn anew each time that they are read."""

    def drawn_targets(self, rows: list[int], position: int) -> int:
        """Return the supervised tokens of the chosen rows in the global batch at ``position``."""
        ...


class TokenRows:
    """Tokenized rows with their lengths and target counts."""

    def __init__(self, data: Dataset) -> None:
        self._data = data.with_format("numpy")
        self.sources = np.array(data["source"], dtype=np.int64)
        """Index of each row's source."""
        self.lengths = np.array([len(ids) for ids in self._column("input_ids")], dtype=np.int64)
        self.targets = np.array([int(mask[1:].sum()) for mask in self._column("learned")], dtype=np.int64)

    def _column(self, name: str) -> Iterator[np.ndarray]:
        for part in self._data.select_columns([name]).iter(batch_size=1024):
            yield from cast(dict[str, Any], part)[name]

    def __len__(self) -> int:
        return len(self.lengths)

    def largest_token(self) -> int:
        """Return the largest token id in any row; this reads all rows."""
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
        """Return each row as a sequence of its own."""
        return [[self.row(row)] for row in rows]

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return ``rows``."""
        return tuple(rows)

    def collate(self, rows: list[int], number: int, position: int = 0) -> TokenBatch:
        """Pad ``rows`` to the longest of them."""
        width = max(2, int(self.lengths[rows].max()))
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
        for line, row in enumerate(rows):
            ids, learned = self.row(row)
            input_ids[line, : len(ids)] = ids
            labels[line, : len(ids)] = torch.where(learned, ids, IGNORE)
        return TokenBatch(number, input_ids, labels, rows=tuple(rows))

    def idle(self) -> TokenBatch:
        """Return a micro-batch of weight zero."""
        return idle_tokens()


def idle_tokens() -> TokenBatch:
    """Return a minimal micro-batch of tokens, of weight zero."""
    nothing = torch.zeros(1, 2, dtype=torch.int64)
    return TokenBatch(-1, nothing, nothing.clone(), weight=0.0, rare=True)


@dataclass(frozen=True)
class Cut:
    """How to cut a global batch into micro-batches, and the rank whose share is taken."""

    micro_batch_size: int
    """Rows per micro-batch."""
    rank: int
    num_ranks: int
    micro_batch_tokens: int = 0
    """Token budget of a micro-batch, including padding; replaces the number of rows unless 0."""

    def pieces(self, rows: Rows, chosen: list[int]) -> list[list[int]]:
        """Cut ``chosen`` into micro-batches of rows of similar length; a row above the budget gets its own."""
        ordered = sorted(chosen, key=lambda row: (int(rows.lengths[row]), row))
        if not self.micro_batch_tokens:
            size = self.micro_batch_size
            return [ordered[i : i + size] for i in range(0, len(ordered), size)]
        micro_batches: list[list[int]] = []
        for row in ordered:
            if micro_batches and rows.room([*micro_batches[-1], row]) <= self.micro_batch_tokens:
                micro_batches[-1].append(row)
            else:
                micro_batches.append([row])
        return micro_batches


class Loader:
    """Builds this rank's part of each global batch of training rows."""

    def __init__(self, rows: Rows, global_batch_size: int, cut: Cut, seed: int, length_grouped: bool = False) -> None:
        self.rows, self.global_batch_size, self.cut = rows, global_batch_size, cut
        self.seed, self.length_grouped = seed, length_grouped
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = random.permutation(len(self.rows))
        return self._grouped(order, random) if self.length_grouped else order

    def _grouped(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sort windows of shuffled rows by length, cut them into global batches, and shuffle these in each window."""
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
        """Return the row indices at positions ``[position, position + count)``."""
        size = len(self.rows)
        return [int(self._order(p // size)[p % size]) for p in range(position, position + count)]

    def batch_at(self, position: int, limit: int | None = None) -> Batch:
        """Return this rank's part of the global batch at ``position``; the batch ends before ``limit``, if given."""
        count = self.global_batch_size if limit is None else min(self.global_batch_size, limit - position)
        chosen = self.indices(position, count)
        return build_batch(self.rows, chosen, self.cut, position)


def build_batch(rows: Rows, chosen: list[int], cut: Cut, position: int = 0) -> Batch:
    """Cut the rows of the global batch at ``position`` into micro-batches and collate this rank's."""
    micro_batches = list(cut_rows(rows, chosen, cut, position))
    return Batch(micro_batches, len(chosen), int(rows.lengths[chosen].sum()), weights_of(rows, chosen, position))


def cut_rows(rows: Rows, chosen: list[int], cut: Cut, position: int = 0) -> Iterator[MicroBatch]:
    """Cut rows into micro-batches and yield this rank's, one by one."""
    pieces = cut.pieces(rows, chosen)
    for number in deal(len(pieces), cut.rank, cut.num_ranks):
        yield rows.idle() if number is None else rows.collate(pieces[number], number, position)


def weights_of(rows: Rows, chosen: list[int], position: int = 0) -> dict[str, int]:
    """Return the denominators of the loss over the chosen rows, which are those of all ranks."""
    drawn = isinstance(rows, DrawnTargets)
    return {
        TOKENS: rows.drawn_targets(chosen, position) if drawn else int(rows.targets[chosen].sum()), ROWS: len(chosen)
    }  # fmt: skip
