"""Samples as the model sees them: text with the learned parts marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.loader import TokenRows


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens that are all learned or all not learned."""

    text: str
    learned: bool
    num_tokens: int


def segments(rows: TokenRows, number: int, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Return row ``number`` split into learned and other segments."""
    ids, learned = rows.row(number)
    return runs_of(ids.tolist(), learned.tolist(), tokenizer)


def runs_of(ids: Sequence[int], learned: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Return tokens split into learned and other segments."""
    pairs = list(zip(learned, ids, strict=True))
    shown = []
    for flag, group in groupby(pairs, key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        shown.append(Segment(str(tokenizer.decode(tokens)), flag, len(tokens)))
    return shown
