"""Pairs of texts as an encoder-decoder learns them: a source that it reads, and a target that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, mask_of, padded
from fsdp_qlora.data.encoder import Counts, EachAlone, Read, Stored
from fsdp_qlora.data.labels import IGNORE, learned_positions
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import digest_of, key_of, require_short, text_in
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LABELS, SUPERVISED, TARGET = "labels", "supervised", "target"
"""Tensors that are compared with what the model writes, not read by it: the target's tokens, and where in the flattened
labels there is one. And the stored column with the target's text."""


class Side:
    """Tokenizes sources or targets, and cuts or drops those that are too long. Any tokenizer will do, slow ones too."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str, learned: bool = False,
        end: int | None = None,
    ) -> None:  # fmt: skip
        """Tokenize one side.

        Args:
            tokenizer: that of the model, which may encode targets in another way than sources.
            max_length: of a text, in tokens, the tokenizer's own ones included.
            truncation: ``right``, ``left`` or ``drop``.
            learned: whether these are targets.
            end: the model's end token; a target ends with it if the tokenizer marks no text itself.
        """
        self._tokenizer, self._max_length, self._truncation = deepcopy(tokenizer), max_length, truncation
        self._tokenizer.truncation_side = "left" if truncation == "left" else "right"
        self._as = "text_target" if learned else "text"
        marks = self._ids("a") != self._ids("a", add_special_tokens=False)
        self._end = [end] if learned and end is not None and not marks else []
        self.identity = [max_length, self._end]

    def __call__(self, text: str, counts: Counts) -> np.ndarray | None:
        """Return the tokens, int32 ``[length]``, or None if the text is dropped, and count what happened to it.

        Raises:
            DataError: if it is far longer than any model reads.
        """
        require_short((text,))
        ids = self._ids(text) + self._end
        if len(ids) > self._max_length:
            if self._truncation == "drop":
                counts.dropped_long += 1
                return None
            counts.truncated += 1
            ids = self._ids(text, truncation=True, max_length=self._max_length - len(self._end)) + self._end
        return np.array(ids, dtype=np.int32)

    def _ids(self, text: str, **more: Any) -> list[int]:
        return list(self._tokenizer(**{self._as: text}, verbose=False, **more)["input_ids"])  # type: ignore[arg-type]


class PairEncoder(EachAlone):
    """Stores the tokens of a source and of a target, and the target's text, which what is written is compared with."""

    columns: ClassVar = {
        "input_ids": "int32[]", LABELS: "int32[]", TARGET: "string", LENGTH: "int32", TARGETS: "int32"
    }  # fmt: skip

    def __init__(
        self, read: Read, tokenizer: PreTrainedTokenizerBase, sources: Side, targets: Side, pad: int, prefix: str = "",
        positions: int = 0,
    ) -> None:  # fmt: skip
        """Store pairs.

        Args:
            read: reads a row's columns.
            tokenizer: decodes tokens.
            sources: tokenizes sources.
            targets: tokenizes targets.
            pad: the token that pads sources.
            prefix: put before each source.
            positions: the longest source or target that the model reads; 0 for no limit.
        """
        self._read, self._tokenizer, self._pad, self._prefix = read, tokenizer, pad, prefix
        self._sources, self._targets, self._positions = sources, targets, positions
        self.identity = ["pairs", prefix, sources.identity, targets.identity, positions]

    def stored(self, row: Row) -> Stored:
        """Return the tokens of a row."""
        values = self._read(row)
        source, target = (text_in(values, name) for name in ("source", TARGET))
        stored = Stored(key_of(source), digest_of(source.encode(), target.encode()))
        of_source, of_target = Counts(), Counts()
        read, written = self._sources(self._prefix + source, of_source), self._targets(target, of_target)
        counts = stored.counts
        counts.truncated = max(of_source.truncated, of_target.truncated)
        counts.dropped_long = max(of_source.dropped_long, of_target.dropped_long)
        if read is None or written is None:
            return stored
        longest = max(len(read), len(written))
        if self._positions and longest > self._positions:
            raise DataError(
                f"the row takes {longest} tokens, and the model has {self._positions} positions; set data.max_length "
                f"and objective.max_target_length to at most {self._positions}"
            )
        stored.keep({"input_ids": read, LABELS: written, TARGET: target}, len(read) + len(written), len(written))
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored pairs as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        labels = padded([row[LABELS] for row in rows], IGNORE)
        return {
            "input_ids": padded(ids, self._pad), "attention_mask": mask_of(ids), LABELS: labels,
            SUPERVISED: learned_positions(labels),
        }  # fmt: skip

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's source, and its target as what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        texts = [str(self._tokenizer.decode(row[name])) for name in ("input_ids", LABELS)]
        return [Segment(texts[0], False, len(row["input_ids"])), Segment(texts[1], True, len(row[LABELS]))]
