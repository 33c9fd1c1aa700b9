"""embedding: a vector for each text, such that those of a pair lie close together."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import DataSettings, ObjectiveSettings
from fsdp_qlora.data.columns import LENGTH, TARGETS, ColumnRows, mask_of, padded
from fsdp_qlora.data.encoder import Counts, EachAlone, Read, Stored
from fsdp_qlora.data.labels import ROWS
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import MicroBatch, NamedBatch, Rows
from fsdp_qlora.data.prepare import columns_of, fast
from fsdp_qlora.data.samples import Segment
from fsdp_qlora.data.texts import TextTokenizer, digest_of, key_of, pad_token, text_in, within_positions
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ModelError
from fsdp_qlora.objectives.contrast import Known, Table, Texts, all_tables, differentiate, losses, retrieval
from fsdp_qlora.objectives.objective import Objective, Sums, register, stand_in_texts, without_cache
from fsdp_qlora.objectives.pooling import pool, pooling_of, sentence_transformers_files

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ROLES = ("anchor", "positive", "negative")
"""Columns of a row; and tensors of a micro-batch, int64 ``[texts]``: where in it the texts of each column are."""


@register
class Embedding(Objective):
    """The cross entropy of each row's positive among those of all rows, by cosine similarity; a mean over rows."""

    name = "embedding"
    auto_class = "AutoModel"
    ignores_head = True
    scores_rows = True
    task_type = "FEATURE_EXTRACTION"

    def __init__(self, settings: ObjectiveSettings | None = None) -> None:
        super().__init__(settings)
        self._known: Mapping[int, Known] | None = None
        self._alike = False
        """Whether all ranks have as many rows, so that none needs to tell the others."""

    def settled(self, folder: Path, config: PreTrainedConfig) -> ObjectiveSettings:
        """Return the settings with the model's own pooling, unless another is asked for."""
        return replace(self.settings, pooling=asked(self.settings.pooling) or pooling_of(folder, config))  # type: ignore[arg-type]

    def configure(self, config: PreTrainedConfig) -> None:
        """Keep no keys and values for further tokens.

        Raises:
            ModelError: if it describes an encoder-decoder.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model.name: a {config.model_type} has an encoder and a decoder; objective=embedding trains models "
                "with one of them."
            )
        without_cache(config)

    def prune(self, model: PreTrainedModel) -> None:
        """Take out BERT's pooler, whose output is not used."""
        if isinstance(pooler := getattr(model, "pooler", None), nn.Module):
            model.pooler = _Unused(pooler)

    def encoder(self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> _Pairs:
        """Return what stores pairs of texts."""
        return _Pairs(columns_of(data), fast(tokenizer), within_positions(data, tokenizer, config), pad_token(config))

    def stand_in(self, folder: Path, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Return rows of three texts."""
        vocab, roles = config.get_text_config().vocab_size, len(_ROLES)
        return stand_in_texts(roles * rows, length, vocab) | _places([rows] * roles)

    def files(self, data: DataSettings, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the files by which sentence-transformers load the adapter."""
        text = config.get_text_config()
        longest = min(data.max_length, getattr(text, "max_position_embeddings", None) or data.max_length)
        return sentence_transformers_files(self.settings.pooling, int(text.hidden_size), longest)

    @torch.no_grad()
    def before(
        self, model: nn.Module, micro_batches: Sequence[MicroBatch], ranks: Ranks, draw: Callable[[MicroBatch], None]
    ) -> Embedding:
        """Return the objective that knows the vectors of all rows of a global batch; see `contrast`."""
        own: list[tuple[int, Texts]] = []
        table: Table = []
        for micro_batch in micro_batches:
            draw(micro_batch)
            texts = self._texts(model, micro_batch.to(ranks.device))
            own.append((micro_batch.number, texts))
            count, more = (len(texts.anchors), len(texts.negatives)) if micro_batch.weight else (0, 0)
            table.append((micro_batch.number, count, more))
        knowing = copy(self)
        knowing._known = differentiate(own, self.settings.temperature, ranks, self._tables(table, ranks))
        return knowing

    def _tables(self, own: Table, ranks: Ranks) -> list[Table]:
        if not self._alike:
            return all_tables(own, ranks)
        return [[(rank * len(own) + at, *line[1:]) for at, line in enumerate(own)] for rank in range(ranks.size)]

    def without_values(self) -> Embedding:
        """Return one that assumes that all ranks have as many rows."""
        alike = copy(self)
        alike._alike = True
        return alike

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the loss of the rows, among those of the global batch after `before`, else of the micro-batch alone.

        After `before`, the gradient is the micro-batch's share of that of the global batch's loss, to which all its
        vectors contribute: as negatives of other rows, too.
        """
        texts = self._texts(model, micro_batch)
        if self._known is None:
            return {"loss": (losses(texts, self.settings.temperature).sum(), ROWS)}
        if (known := self._known.get(micro_batch.number)) is None:  # it is there for the collectives only
            return {"loss": (texts.joined().sum() * 0.0, ROWS)}
        carried = (texts.joined() * known.slopes).sum()
        return {"loss": (carried - carried.detach() + known.loss, ROWS)}

    def observe(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Sums, list[Any]]:
        """Return the sums, with the negatives of the micro-batch alone, and each row's two vectors."""
        texts = self._texts(model, micro_batch)
        sums: Sums = {"loss": (losses(texts, self.settings.temperature).sum(), ROWS)}
        anchors, positives = (vectors.cpu().numpy() for vectors in (texts.anchors, texts.positives))
        return sums, [[_packed(a), _packed(b)] for a, b in zip(anchors, positives, strict=True)]

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return how often a row's positive is the most similar of all held-out ones, and the mean of 1 / its rank."""
        anchors, positives = (torch.from_numpy(np.stack([unpacked(row[i]) for row in observed])) for i in (0, 1))
        first, reciprocal = retrieval(anchors, positives)
        return {"accuracy": sum(first) / len(first), "mrr": sum(reciprocal) / len(reciprocal)}

    def _texts(self, model: nn.Module, micro_batch: MicroBatch) -> Texts:
        assert isinstance(micro_batch, NamedBatch)
        inputs = dict(micro_batch.tensors)
        places = [inputs.pop(role) for role in _ROLES]
        hidden = model.outputs(**inputs).last_hidden_state  # type: ignore[operator]
        vectors = pool(hidden, inputs["attention_mask"], self.settings.pooling)
        return Texts(*(vectors.index_select(0, place) for place in places))


class _Unused(nn.Module):
    """Stands where a pooler was, under the names of its modules, which an adapter's patterns must not match."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, child in like.named_children():
            self.add_module(name, _Unused(child))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input, which nothing reads (ALBERT computes with it)."""
        return hidden


def _places(sizes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the tensors of `_ROLES` for texts that are ordered by their columns."""
    return dict(zip(_ROLES, torch.arange(sum(sizes)).split(list(sizes)), strict=True))


def _packed(vector: np.ndarray) -> str:
    return b64encode(vector.astype("<f4").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """Return a vector that `Embedding.observe` has written: float32 ``[hidden]``."""
    return np.frombuffer(b64decode(text), dtype="<f4").astype(np.float32)


class _Pairs(EachAlone):
    """Stores the tokens of two texts, or three with a negative."""

    columns: ClassVar = {**dict.fromkeys(_ROLES, "int32[]"), LENGTH: "int32", TARGETS: "int32"}

    def __init__(self, read: Read, tokenizer: PreTrainedTokenizerBase, data: DataSettings, pad: int) -> None:
        self._read, self._tokenizer, self._pad = read, tokenizer, pad
        self.identity = ["embedding", data.max_length]
        self._encode = TextTokenizer(tokenizer, data.max_length, data.truncation)

    def stored(self, row: Row) -> Stored:
        """Return the tokens of a row's texts."""
        values = self._read(row)
        given = [name for name in _ROLES if name != "negative" or values.get(name) is not None]
        texts = {name: text_in(values, name) for name in given}
        stored = Stored(key_of(texts["anchor"]), digest_of(*(text.encode() for text in texts.values())))
        counts = [Counts() for _ in texts]
        made = self._encode([(text,) for text in texts.values()], counts)
        stored.counts.truncated += any(count.truncated for count in counts)
        if any(tokens is None for tokens in made):
            stored.counts.dropped_long += 1
            return stored
        ids = {name: tokens.ids for name, tokens in zip(texts, made, strict=True) if tokens is not None}
        item = {name: ids.get(name, np.zeros(0, dtype=np.int32)) for name in _ROLES}
        stored.keep(item, sum(map(len, ids.values())), 1)
        return stored

    def rows(self, data: Dataset) -> ColumnRows:
        """Return stored pairs as rows."""
        return ColumnRows(data, self._collate)

    def _collate(self, rows: Sequence[Mapping[str, Any]], numbers: tuple[int, ...], at: int) -> dict[str, torch.Tensor]:
        texts = {role: [row[role] for row in rows if len(row[role])] for role in _ROLES}
        ids = [text for role in _ROLES for text in texts[role]]
        return {"input_ids": padded(ids, self._pad), "attention_mask": mask_of(ids)} | _places(
            [len(texts[role]) for role in _ROLES]
        )

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return a row's texts; what comes after the anchor is what is learned."""
        assert isinstance(rows, ColumnRows)
        row = rows.row(number)
        return [
            Segment(f"{' ' * bool(at)}{self._tokenizer.decode(row[role])}", role == "positive", len(row[role]))
            for at, role in enumerate(_ROLES)
            if len(row[role])
        ]
