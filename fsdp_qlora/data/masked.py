"""Texts with masked tokens: which ones, and what stands in their place. Drawn anew each time that a row is read.

Draws come from the seed, the position of the global batch and the row's number, so they are the same on any number of
ranks and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fsdp_qlora.data.columns import ColumnRows, mask_of, padded
from fsdp_qlora.data.labels import IGNORE, learned_positions

if TYPE_CHECKING:
    from datasets import Dataset

_KIND = 0x6D61736B
"""Keeps these draws apart from other ones with the same seed."""
_MASKED, _REPLACED = 0.8, 0.9
"""As in BERT (https://arxiv.org/abs/1810.04805, appendix A.1): 80 % become the mask, 10 % any token, 10 % stay."""


@dataclass(frozen=True)
class Masking:
    """How tokens are masked."""

    share: float
    """Of a row's tokens, without special ones."""
    whole_words: bool
    mask: int
    """Id of the mask."""
    num_ids: int
    """Ids below it may take a token's place."""
    pad: int
    seed: int = 0

    def count(self, word: np.ndarray) -> int:
        """Return how many of a row's tokens to predict (of whole words: at most); ``word`` is `Encoded.word`."""
        maskable = int((word >= 0).sum())
        return min(maskable, max(1, round(self.share * maskable)))

    def chosen(self, word: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the positions of the tokens to predict, in order: int64 ``[count]``, of whole words at most so many.

        As in BERT's code, words are drawn in random order, and those that would be too many tokens are passed over. If
        all are, the first is taken.
        """
        places, count = np.flatnonzero(word >= 0), self.count(word)
        if not self.whole_words or not len(places):
            return np.sort(random.permutation(places)[:count])
        words = np.split(places, np.flatnonzero(np.diff(word[places])) + 1)
        taken: list[np.ndarray] = []
        order = random.permutation(len(words))
        for number in order:
            if sum(map(len, taken)) + len(words[number]) <= count:
                taken.append(words[number])
        return np.sort(np.concatenate(taken or [words[order[0]]]))

    def random(self, position: int, row: int) -> np.random.Generator:
        """Return the generator of a row in the global batch at ``position``."""
        return np.random.Generator(np.random.PCG64([_KIND, self.seed, position, row]))

    def draw(self, ids: np.ndarray, word: np.ndarray, position: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's tokens as the model reads them, and its labels, -100 where there is nothing to predict."""
        random = self.random(position, row)
        chosen = self.chosen(word, random)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        labels[chosen] = ids[chosen]
        fate, other = random.random(len(chosen)), random.integers(0, self.num_ids, len(chosen))
        read = np.array(ids, dtype=np.int64)
        read[chosen] = np.where(fate < _MASKED, self.mask, np.where(fate < _REPLACED, other, read[chosen]))
        return read, labels


class MaskedRows(ColumnRows):
    """Stored texts, whose tokens are masked as they are read."""

    def __init__(self, data: Dataset, masking: Masking) -> None:
        super().__init__(data, self._masked)
        self._masking = masking

    def drawn_targets(self, rows: list[int], position: int) -> int:
        """Return how many tokens of the chosen rows are predicted in the global batch at ``position``."""
        if not self._masking.whole_words:
            return int(self.targets[rows].sum())
        words = ((row, self.row(row)["word"]) for row in rows)
        return sum(len(self._masking.chosen(word, self._masking.random(position, row))) for row, word in words)

    def _masked(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        drawn = [
            self._masking.draw(row["input_ids"], row["word"], at, number)
            for row, number in zip(rows, numbers, strict=True)
        ]
        labels = padded([labels for _, labels in drawn], IGNORE)
        ids = [ids for ids, _ in drawn]
        return {
            "input_ids": padded(ids, self._masking.pad), "attention_mask": mask_of(ids), "labels": labels,
            "supervised": learned_positions(labels),
        }  # fmt: skip
