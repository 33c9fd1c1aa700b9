"""sequence_classification: a label, several labels, or a number for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fsdp_qlora.config.schema import DataSettings, ObjectiveSettings
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, mask_of, padded
from fsdp_qlora.data.encoder import Outcome, Read, RowEncoder, Stored
from fsdp_qlora.data.labels import ROWS
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import MicroBatch, NamedBatch, Rows
from fsdp_qlora.data.messages import text_of
from fsdp_qlora.data.prepare import columns_of, fast
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import TextTokenizer, digest_of, key_of, pad_token, within_positions
from fsdp_qlora.errors import DataError
from fsdp_qlora.objectives.labels import MULTI, REGRESSION, SINGLE, Labels, label_maps
from fsdp_qlora.objectives.objective import Objective, Sums, register
from fsdp_qlora.objectives.scores import of_labels, of_numbers, of_sets

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_LABEL = "label"


@register
class SequenceClassification(Objective):
    """The loss that transformers' own ``For...SequenceClassification`` computes, as a mean over rows."""

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    trains_head = True
    scores_rows = True
    task_type = "SEQ_CLS"

    def __init__(self, settings: ObjectiveSettings | None = None) -> None:
        super().__init__(settings)
        self.labels = Labels(self.settings)

    @property
    def packages(self) -> tuple[str, ...]:
        """What its metrics are computed by."""
        return ("sklearn",)

    def configure(self, config: PreTrainedConfig) -> None:
        """Set labels and problem type, and which token is padding: decoders look for the last token before it."""
        config.update(dict(label_maps(self.labels)))
        text = config.get_text_config()
        text.pad_token_id = pad_token(config)

    def encoder(
        self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> _ClassifiedTexts:
        """Return what stores texts with their labels."""
        data = within_positions(data, tokenizer, config)
        return _ClassifiedTexts(columns_of(data), fast(tokenizer), data, self.labels, pad_token(config))

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the summed loss of the rows."""
        return {"loss": (self._losses(*self._logits(model, micro_batch)), ROWS)}

    def observe(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Sums, list[Any]]:
        """Return the sums, and for each row what is predicted and what is right."""
        logits, wanted = self._logits(model, micro_batch)
        sums: Sums = {"loss": (self._losses(logits, wanted), ROWS)}
        if self.labels.problem == SINGLE:
            predicted = logits.argmax(1, keepdim=True)
        else:
            predicted = (logits > 0).long() if self.labels.problem == MULTI else logits
        return sums, [list(pair) for pair in zip(predicted.tolist(), wanted.tolist(), strict=True)]

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return accuracy and macro F1, or the mean squared error and correlation of numbers."""
        predicted, wanted = zip(*observed, strict=True)
        kinds = {SINGLE: of_labels, MULTI: of_sets, REGRESSION: of_numbers}
        return kinds[self.labels.problem](predicted, wanted)

    def _logits(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 ``[rows, outputs]`` and the labels ``[rows, columns]``."""
        assert isinstance(micro_batch, NamedBatch)
        inputs = dict(micro_batch.tensors)
        wanted = inputs.pop(_LABEL)
        return model.outputs(**inputs).logits.float(), wanted  # type: ignore[operator]

    def _losses(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return the sum over rows; of several labels or numbers, each row counts their mean, as upstream's does."""
        if self.labels.problem == REGRESSION:
            return F.mse_loss(logits, wanted, reduction="sum") / wanted.shape[1]
        if self.labels.problem == MULTI:
            return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / wanted.shape[1]
        factors = self.settings.class_weights
        weight = logits.new_tensor([factors.get(name, 1.0) for name in self.labels.names]) if factors else None
        return F.cross_entropy(logits, wanted[:, 0].long(), weight=weight, reduction="sum")


class _ClassifiedTexts(RowEncoder):
    """Stores the tokens of a text or a pair of texts, and its label."""

    columns: ClassVar = {
        "input_ids": "int32[]", "token_type_ids": "int32[]", _LABEL: "float[]", LENGTH: "int32", TARGETS: "int32"
    }  # fmt: skip

    def __init__(
        self, read: Read, tokenizer: PreTrainedTokenizerBase, data: DataSettings, labels: Labels, pad: int
    ) -> None:
        self._read, self._tokenizer, self._labels, self._pad = read, tokenizer, labels, pad
        self._encode = TextTokenizer(tokenizer, data.max_length, data.truncation)
        self._typed = "token_type_ids" in tokenizer.model_input_names
        self.identity = ["sequence_classification", labels.names, labels.problem, data.max_length]

    def encode(self, batch: list[tuple[int, Row]]) -> Iterator[tuple[int, str, Outcome]]:
        """Yield the source, the place and the tokens of each row."""
        for number, row in batch:
            try:
                yield number, row.where, self._stored(row)
            except DataError as error:
                yield number, row.where, error

    def _stored(self, row: Row) -> Stored:
        values = self._read(row)
        if values.get("text") is None:
            raise DataError("the row has no 'text' (data.columns can rename another column to it)")
        pair = values.get("text_pair")
        texts = (text_of(values["text"]), *(() if pair is None else (text_of(pair),)))
        if not texts[0].strip():
            raise DataError("the text is empty")
        label = self._labels.vector(values.get(_LABEL))
        stored = Stored(key_of(*texts), digest_of(*(text.encode() for text in texts), repr(label).encode()))
        (tokens,) = self._encode([texts], [stored.counts])
        if tokens is not None:
            stored.counts.add(stored.counts.__class__(kept=1, tokens=len(tokens.ids), target_tokens=1))
            stored.items.append(
                {"input_ids": tokens.ids, "token_type_ids": tokens.types, _LABEL: label, LENGTH: len(tokens.ids),
                 TARGETS: 1}
            )  # fmt: skip
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored texts as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        tensors = {"input_ids": padded(ids, self._pad), "attention_mask": mask_of(ids)}
        if self._typed:
            tensors["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
        return tensors | {_LABEL: torch.from_numpy(np.stack([row[_LABEL] for row in rows]).astype(np.float32))}

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's text, and its label as what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        text = str(self._tokenizer.decode(row["input_ids"]))
        return [Segment(text, False, len(row["input_ids"])), Segment(self._shown(row[_LABEL]), True, 1)]

    def _shown(self, label: np.ndarray) -> str:
        names, problem = self._labels.names, self._labels.problem
        if problem == REGRESSION:
            return f"{label[0]:g}"
        return (
            names[int(label[0])] if problem == SINGLE else ", ".join(n for n, y in zip(names, label, strict=True) if y)
        )
