"""Tokenizes a long text window by window: a tokenizer needs some 200 times a text's size in memory.

The result equals the tokens of the whole text. Neighbouring windows overlap and are joined in the middle of a stretch
in which both have the same tokens. Near its ends a window's tokens may differ: a space prepended to the text, or a word
cut in two.

::

    one window    |-----------------------------------|
    the next                               |-----------------------------------|
    compared                                  ^^^^^^
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fsdp_qlora.errors import DataError

WINDOW = 2**18
"""Characters in a window."""
OVERLAP = 2**13
_TRIES = 8
"""Number of starts to try for the next window, each one overlap earlier than the one before."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text."""

    ids: np.ndarray
    """int32 ``[length]``."""
    offsets: np.ndarray
    """int64 ``[length, 2]``: start and end in the text."""
    added: np.ndarray
    """bool ``[length]``: special tokens that the tokenizer added before or after the text, with no place in it."""

    def part(self, start: int, stop: int | None) -> Tokens:
        """Return the tokens ``[start, stop)``."""
        return Tokens(self.ids[start:stop], self.offsets[start:stop], self.added[start:stop])

    def moved(self, by: int) -> Tokens:
        """Shift the offsets by ``by`` characters, except those of added tokens."""
        return Tokens(self.ids, np.where(self.added[:, None], self.offsets, self.offsets + by), self.added)

    def places(self) -> np.ndarray:
        """Return one row per token: start, end, id."""
        return np.column_stack([self.offsets, self.ids])


Tokenize = Callable[[str], Tokens]


def tokenize_in_windows(text: str, tokenize: Tokenize, window: int = WINDOW, overlap: int = OVERLAP) -> Tokens:
    """Return the tokens of a text, passing at most one window at a time to the tokenizer.

    Raises:
        DataError: if no start within the search range gives two windows a common stretch of tokens.
    """
    parts = [tokenize(text[:window])]
    stop = window
    while stop < len(text):
        last = parts[-1]
        for start in _starts(last, stop, overlap):
            following = tokenize(text[start : start + window]).moved(start)
            if (cut := _meeting(last, following, start, stop)) is not None:
                break
        else:
            raise DataError(
                f"the text of {len(text)} characters is too long to tokenize at once, and at character {stop} its "
                "tokens depend on more context than fits; shorten the row"
            )
        parts[-1] = last.part(0, cut[0])
        parts.append(following.part(cut[1], None))
        stop = start + window
    return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "offsets", "added")))


def _starts(last: Tokens, stop: int, overlap: int) -> list[int]:
    """Return starts to try for the next window: all at token boundaries, so that repeated text is cut consistently."""
    own = last.offsets[~last.added, 0]
    if not len(own):
        return []
    places = [own[max(0, np.searchsorted(own, stop - n * overlap) - 1)] for n in range(1, _TRIES + 1)]
    return [int(place) for place in dict.fromkeys(places) if own[0] < place < stop - overlap // 2]


def _meeting(last: Tokens, following: Tokens, start: int, stop: int) -> tuple[int, int] | None:
    """Return how many tokens to keep of ``last`` and to drop from ``following``; None if they do not agree."""
    margin = (stop - start) // 4
    inner = [
        np.flatnonzero(~t.added & (t.offsets[:, 0] >= start + margin) & (t.offsets[:, 1] <= stop - margin))
        for t in (last, following)
    ]
    one, other = (t.places()[chosen] for t, chosen in zip((last, following), inner, strict=True))
    if not len(one) or not np.array_equal(one, other):
        return None
    middle = len(one) // 2
    return int(inner[0][middle]), int(inner[1][middle])
