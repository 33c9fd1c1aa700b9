"""masked_lm: a model that reads in both directions (BERT) predicts the tokens that are masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows
from fsdp_qlora.data.encoder import EachAlone, Read, Stored
from fsdp_qlora.data.labels import IGNORE, learned_positions
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.masked import MaskedRows, Masking
from fsdp_qlora.data.prepare import columns_of, fast
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import TextTokenizer, digest_of, key_of, pad_token, text_in, within_positions
from fsdp_qlora.errors import ModelError
from fsdp_qlora.objectives.objective import PerToken, register, stand_in_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@register
class MaskedLanguageModel(PerToken):
    """The mean cross entropy of the masked tokens of the global batch."""

    name = "masked_lm"
    auto_class = "AutoModelForMaskedLM"
    uses_head = True
    may_lack_head = True
    task_type = None

    def stand_in(self, folder: Path, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Return texts whose first tokens are masked, as many as in texts without special tokens."""
        texts = stand_in_texts(rows, length, config.get_text_config().vocab_size)
        labels = torch.full_like(ids := texts["input_ids"], IGNORE)
        count = max(1, round(self.settings.mask_probability * length))
        labels[:, :count] = ids[:, :count]
        return texts | {"labels": labels, "supervised": learned_positions(labels)}

    def encoder(self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> _Texts:
        """Return what stores texts.

        Raises:
            ModelError: if the tokenizer has no mask.
        """
        if not isinstance(mask := tokenizer.mask_token_id, int):
            raise ModelError(
                "model.name: its tokenizer has no mask token, so objective=masked_lm cannot train it; use a model such "
                "as BERT."
            )
        settings, text = self.settings, config.get_text_config()
        masking = Masking(
            settings.mask_probability, settings.whole_words, mask,
            min(len(tokenizer), text.vocab_size), pad_token(config),
        )  # fmt: skip
        return _Texts(columns_of(data), fast(tokenizer), within_positions(data, tokenizer, config), masking)


class _Texts(EachAlone):
    """Stores the tokens of texts, and the words that they belong to."""

    columns: ClassVar = {"input_ids": "int32[]", "word": "int32[]", LENGTH: "int32", TARGETS: "int32"}

    def __init__(self, read: Read, tokenizer: PreTrainedTokenizerBase, data: DataSettings, masking: Masking) -> None:
        self._read, self._tokenizer, self._masking = read, tokenizer, masking
        self._encode = TextTokenizer(tokenizer, data.max_length, data.truncation)
        self.identity = ["masked_lm", masking.share, data.max_length]

    def stored(self, row: Row) -> Stored:
        """Return the tokens of a row."""
        text = text_in(self._read(row), "text")
        stored = Stored(key_of(text), digest_of(text.encode()))
        for tokens in self._encode.pieces(text, stored.counts):
            targets = self._masking.count(tokens.word)
            if not targets:
                stored.counts.dropped_unsupervised += 1
                continue
            stored.keep({"input_ids": tokens.ids, "word": tokens.word}, len(tokens.ids), targets)
        return stored

    def rows(self, data: Dataset) -> MaskedRows:
        """Return stored texts as rows that are always masked in the same way."""
        return MaskedRows(data, self._masking)

    def training_rows(self, data: Dataset, seed: int) -> MaskedRows:
        """Return stored texts as rows that are masked anew in each epoch."""
        return MaskedRows(data, replace(self._masking, seed=1 + seed))

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's text, its tokens to predict marked."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        return _segments(row, self._masking, number, self._tokenizer)


def _segments(
    row: Mapping[str, Any], masking: Masking, number: int, tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    ids, word = row["input_ids"], row["word"]
    chosen = set(masking.chosen(word, masking.random(0, number)).tolist())
    shown: list[Segment] = []
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or (at in chosen) != (start in chosen):
            text = str(tokenizer.decode(ids[start:at]))
            shown.append(Segment(f" {text} " if start in chosen else text, start in chosen, at - start))
            start = at
    return shown
