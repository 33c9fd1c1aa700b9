"""Stored rows of objectives with columns of their own: `ColumnRows` and the padding of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fsdp_qlora.data.loader import NamedBatch, Piece

if TYPE_CHECKING:
    from datasets import Dataset

LENGTH, TARGETS = "length", "targets"
"""Columns that every such objective stores: tokens of a row (or what else takes its room), and labels it learns."""
Collate = Callable[[Sequence[Mapping[str, Any]], tuple[int, ...], int], dict[str, torch.Tensor]]
"""(rows, their numbers, position of the global batch) -> named tensors."""


class ColumnRows:
    """Stored rows with any columns; an objective's ``collate`` makes tensors of them."""

    def __init__(self, data: Dataset, collate: Collate) -> None:
        self._data, self._collate = data.with_format("numpy"), collate
        self.sources, self.lengths, self.targets = (
            np.array(data[name], dtype=np.int64) for name in ("source", LENGTH, TARGETS)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> Mapping[str, Any]:
        """Return a row's columns."""
        return self._data[number]

    def room(self, rows: list[int]) -> int:
        """Return the tokens of ``rows`` when all are padded to the longest."""
        return len(rows) * int(self.lengths[rows].max())

    def pieces(self, rows: list[int]) -> list[list[Piece]]:
        """Refuse: only sequences of a causal language model are made of pieces."""
        raise NotImplementedError("rows of this objective do not share sequences")

    def numbers(self, rows: list[int]) -> tuple[int, ...]:
        """Return ``rows``."""
        return tuple(rows)

    def collate(self, rows: list[int], number: int, position: int = 0) -> NamedBatch:
        """Return the chosen rows as micro-batch ``number`` of the global batch at ``position``."""
        return NamedBatch(number, self._tensors(rows, position), rows=tuple(rows))

    def idle(self) -> NamedBatch:
        """Return the shortest row as a micro-batch of weight zero."""
        return NamedBatch(-1, self._tensors([int(self.lengths.argmin())], 0), weight=0.0)

    def _tensors(self, rows: list[int], position: int) -> dict[str, torch.Tensor]:
        return self._collate([self.row(row) for row in rows], tuple(rows), position)


def padded(values: Sequence[np.ndarray | Sequence[int]], pad: int, least: int = 1) -> torch.Tensor:
    """Return int64 ``[rows, longest]``, each row padded on the right with ``pad``; at least ``least`` wide."""
    arrays = [np.asarray(value, dtype=np.int64) for value in values]
    width = max(least, *(len(array) for array in arrays))
    whole = torch.full((len(arrays), width), pad, dtype=torch.int64)
    for line, array in enumerate(arrays):
        whole[line, : len(array)] = torch.from_numpy(array)
    return whole


def mask_of(values: Sequence[np.ndarray | Sequence[int]], least: int = 1) -> torch.Tensor:
    """Return the attention mask of `padded`: int64 ``[rows, longest]``, 1 where there is a token."""
    return padded([np.ones(len(value), dtype=np.int64) for value in values], 0, least)
