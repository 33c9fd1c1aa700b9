"""Texts that come as lists of words: their tokens, and the first one of each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.encoder import Counts
from fsdp_qlora.data.texts import Encoded, TextTokenizer

NO_WORD = -1
"""Word of a special token."""


@dataclass(frozen=True)
class Words:
    """The tokens of a list of words."""

    tokens: Encoded
    word: np.ndarray
    """int64 ``[length]``: the word that each token belongs to, or `NO_WORD`."""

    @property
    def first(self) -> np.ndarray:
        """Return the positions of tokens that are the first of their word: int64 ``[words with a token]``."""
        _, at = np.unique(self.word, return_index=True)
        return np.sort(at[self.word[at] != NO_WORD])


class WordTokenizer:
    """Tokenizes words joined by spaces, which is the text that models have learned from.

    That is what ``is_split_into_words`` makes too, but for byte-level BPE, whose words it glues together unless the
    tokenizer adds a space before each. Offsets into the text tell which word a token belongs to. A space belongs to the
    word after it, as transformers' ``word_ids`` have it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str) -> None:
        self._encode = TextTokenizer(tokenizer, max_length, truncation)

    def __call__(self, words: Sequence[str], count: Counts) -> Words | None:
        """Return the tokens of a list of words, or None if it is dropped, and count what happened to it.

        Raises:
            DataError: if the text is far longer than any model reads.
        """
        (tokens,) = self._encode([(" ".join(words),)], [count])
        if tokens is None:
            return None
        begins = np.array([0, *accumulate(len(word) + 1 for word in words[:-1])]) - 1
        last = np.maximum(tokens.offsets[:, 0], tokens.offsets[:, 1] - 1)
        word = np.searchsorted(begins, last, side="right") - 1
        return Words(tokens, np.where(tokens.special, NO_WORD, word))
