"""sequence_classification: a label, several labels, or a number for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, mask_of, padded
from fsdp_qlora.data.encoder import EachAlone, Read, Stored
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.messages import text_of
from fsdp_qlora.data.prepare import columns_of, fast
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import TextTokenizer, digest_of, key_of, pad_token, text_in, within_positions
from fsdp_qlora.objectives.classifier import LABEL, Classifier, label_rows, stand_in_labels
from fsdp_qlora.objectives.labels import Labels
from fsdp_qlora.objectives.objective import register, stand_in_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@register
class SequenceClassification(Classifier):
    """The loss that transformers' own ``For...SequenceClassification`` computes, as a mean over rows."""

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"

    def configure(self, config: PreTrainedConfig) -> None:
        """Set labels and problem type, and which token is padding: decoders look for the last token before it."""
        super().configure(config)
        text = config.get_text_config()
        text.pad_token_id = pad_token(config)

    def stand_in(self, folder: Path, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Return texts with a label each."""
        texts = stand_in_texts(rows, length, config.get_text_config().vocab_size)
        return texts | {LABEL: stand_in_labels(self.labels, rows)}

    def encoder(
        self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> _ClassifiedTexts:
        """Return what stores texts with their labels."""
        data = within_positions(data, tokenizer, config)
        return _ClassifiedTexts(columns_of(data), fast(tokenizer), data, self.labels, pad_token(config))


class _ClassifiedTexts(EachAlone):
    """Stores the tokens of a text or a pair of texts, and its label."""

    columns: ClassVar = {
        "input_ids": "int32[]", "token_type_ids": "int32[]", LABEL: "float[]", LENGTH: "int32", TARGETS: "int32"
    }  # fmt: skip

    def __init__(
        self, read: Read, tokenizer: PreTrainedTokenizerBase, data: DataSettings, labels: Labels, pad: int
    ) -> None:
        self._read, self._tokenizer, self._labels, self._pad = read, tokenizer, labels, pad
        self._encode = TextTokenizer(tokenizer, data.max_length, data.truncation)
        self._typed = "token_type_ids" in tokenizer.model_input_names
        self.identity = ["sequence_classification", labels.names, labels.problem, data.max_length]

    def stored(self, row: Row) -> Stored:
        """Return the tokens of a row."""
        values = self._read(row)
        text, pair = text_in(values, "text"), values.get("text_pair")
        texts = (text, *(() if pair is None else (text_of(pair),)))
        label = self._labels.vector(values.get(LABEL))
        stored = Stored(key_of(*texts), digest_of(*(text.encode() for text in texts), repr(label).encode()))
        (tokens,) = self._encode([texts], [stored.counts])
        if tokens is not None:
            item = {"input_ids": tokens.ids, "token_type_ids": tokens.types, LABEL: label}
            stored.keep(item, len(tokens.ids), 1)
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored texts as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        tensors = {"input_ids": padded(ids, self._pad), "attention_mask": mask_of(ids)}
        if self._typed:
            tensors["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
        return tensors | {LABEL: label_rows(rows)}

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's text, and its label as what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        text = str(self._tokenizer.decode(row["input_ids"]))
        return [Segment(text, False, len(row["input_ids"])), Segment(self._labels.shown(row[LABEL]), True, 1)]
