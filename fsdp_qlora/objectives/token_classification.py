"""token_classification: a label for each word of a text, such as the entity that it is a part of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, mask_of, padded
from fsdp_qlora.data.encoder import EachAlone, Read, Stored
from fsdp_qlora.data.labels import IGNORE, TOKENS
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import MicroBatch, NamedBatch, Rows
from fsdp_qlora.data.messages import text_of
from fsdp_qlora.data.prepare import columns_of, fast
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import digest_of, key_of, pad_token, within_positions
from fsdp_qlora.data.words import WordTokenizer
from fsdp_qlora.errors import DataError
from fsdp_qlora.objectives.classifier import Labelled
from fsdp_qlora.objectives.entities import names_entities, of_entities
from fsdp_qlora.objectives.labels import Labels, is_unlabelled
from fsdp_qlora.objectives.objective import Sums, register, stand_in_texts
from fsdp_qlora.objectives.scores import of_labels

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_WORDS, _LABELS = "tokens", "labels"


@register
class TokenClassification(Labelled):
    """The loss of transformers' own ``For...TokenClassification``, as a mean over labelled words.

    The first token of a word has its label; other tokens have none.
    """

    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    label_column = _LABELS
    label_of_each = True
    task_type = "TOKEN_CLS"

    def stand_in(self, folder: Path, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Return texts in which every token begins a word."""
        texts = stand_in_texts(rows, length, config.get_text_config().vocab_size)
        return texts | {_LABELS: texts["input_ids"].remainder(len(self.labels.names))}

    def encoder(
        self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> _LabelledWords:
        """Return what stores texts with the labels of their words."""
        data = within_positions(data, tokenizer, config)
        return _LabelledWords(columns_of(data), fast(tokenizer), data, self.labels, pad_token(config))

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the summed loss of the labelled words."""
        return {"loss": (self._loss(*self._logits(model, micro_batch)), TOKENS)}

    def observe(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Sums, list[Any]]:
        """Return the sums, and for each row the predicted and the right numbers of its words' labels."""
        logits, wanted = self._logits(model, micro_batch)
        predicted, known = logits.argmax(-1), wanted != IGNORE
        rows = [
            [ours[own].tolist(), theirs[own].tolist()]
            for ours, theirs, own in zip(predicted, wanted, known, strict=True)
        ]
        return {"loss": (self._loss(logits, wanted), TOKENS)}, rows

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return accuracy over words, and F1: of entities if the labels name any (``B-PER``), else macro-averaged."""
        names = self.labels.names
        predicted, wanted = zip(*observed, strict=True)
        scores = of_labels(*([[label] for label in chain(*rows)] for rows in (predicted, wanted)))
        if names_entities(names):
            scores |= of_entities(*([[names[label] for label in row] for row in rows] for rows in (predicted, wanted)))
        return scores

    def _logits(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 ``[rows, length, labels]``, and the labels' numbers ``[rows, length]``."""
        assert isinstance(micro_batch, NamedBatch)
        inputs = dict(micro_batch.tensors)
        wanted = inputs.pop(_LABELS)
        return model.outputs(**inputs).logits.float(), wanted  # type: ignore[operator]

    def _loss(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        factors, flat = self.label_factors(logits), logits.flatten(0, 1)
        return F.cross_entropy(flat, wanted.flatten(), weight=factors, ignore_index=IGNORE, reduction="sum")


class _LabelledWords(EachAlone):
    """Stores the tokens of a text, and the label of each that begins a labelled word."""

    columns: ClassVar = {"input_ids": "int32[]", _LABELS: "int32[]", LENGTH: "int32", TARGETS: "int32"}

    def __init__(
        self, read: Read, tokenizer: PreTrainedTokenizerBase, data: DataSettings, labels: Labels, pad: int
    ) -> None:
        self._read, self._tokenizer, self._labels, self._pad = read, tokenizer, labels, pad
        self._encode = WordTokenizer(tokenizer, data.max_length, data.truncation)
        self.identity = ["token_classification", labels.names, data.max_length]

    def stored(self, row: Row) -> Stored:
        """Return the tokens and labels of a row."""
        values = self._read(row)
        words, given = _list(values, _WORDS), _list(values, _LABELS)
        if len(words) != len(given):
            raise DataError(f"{len(words)} 'tokens' but {len(given)} 'labels'; each token needs one (null for none)")
        words = [text_of(word) for word in words]
        if (empty := next((at for at, word in enumerate(words) if not word.strip()), None)) is not None:
            raise DataError(f"token {empty + 1} of {len(words)} is empty")
        numbers = [IGNORE if is_unlabelled(label) else self._labels.number(label) for label in given]
        stored = Stored(key_of(*words), digest_of("\0".join(words).encode(), repr(numbers).encode()))
        if (made := self._encode(words, stored.counts)) is None:
            return stored
        ids, first = made.tokens.ids, made.first
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        labels[first] = np.array(numbers, dtype=np.int32)[made.word[first]]
        if not (targets := int((labels != IGNORE).sum())):
            stored.counts.dropped_unsupervised += 1
            return stored
        stored.keep({"input_ids": ids, _LABELS: labels}, len(ids), targets)
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored texts as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(ids, self._pad), "attention_mask": mask_of(ids),
            _LABELS: padded([row[_LABELS] for row in rows], IGNORE),
        }  # fmt: skip

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's text, with the label before each labelled word as what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        ids, labels = row["input_ids"], row[_LABELS]
        starts = [0, *np.flatnonzero(labels != IGNORE), len(ids)]
        shown = []
        for begin, end in pairwise(starts):
            if begin < end and labels[begin] != IGNORE:
                shown.append(Segment(f" {self._labels.names[labels[begin]]}:", True, 1))
            if begin < end:
                shown.append(Segment(str(self._tokenizer.decode(ids[begin:end])), False, int(end - begin)))
        return shown


def _list(values: Mapping[str, Any], column: str) -> list[Any]:
    value = values.get(column)
    if value is None:
        raise DataError(f"the row has no {column!r} (data.columns can rename another column to it)")
    if not isinstance(value, list | tuple | np.ndarray):
        raise DataError(f"{column!r} is no list but {type(value).__name__}; give one of words and one of their labels")
    if not len(value):
        raise DataError(f"{column!r} is empty")
    return list(value)
