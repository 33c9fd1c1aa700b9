"""Texts, and pairs of texts, as a tokenizer encodes them for an encoder or a classifier: with its special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.encoder import Counts
from fsdp_qlora.data.messages import text_of
from fsdp_qlora.errors import DataError

LONGEST = 2**20
"""Characters that are tokenized at once; the tokenizer needs some 200 bytes for each."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text or a pair."""

    ids: np.ndarray
    """int32 ``[length]``."""
    types: np.ndarray
    """int32 ``[length]``: 0 in the first text, 1 in the second, as the tokenizer has it; zeros if it has none."""
    offsets: np.ndarray
    """int64 ``[length, 2]``: where each token begins and ends in its text, in characters."""
    special: np.ndarray
    """bool ``[length]``: whether the tokenizer added the token."""
    word: np.ndarray
    """int32 ``[length]``: the tokenizer's own word (what it splits texts into before all else) of each token; -1 of one
    that it added."""


class TextTokenizer:
    """Tokenizes texts, and cuts or drops those that are too long."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str) -> None:
        self._tokenizer, self._max_length, self._truncation = deepcopy(tokenizer), max_length, truncation
        self._tokenizer.truncation_side = "left" if truncation == "left" else "right"

    def __call__(self, texts: Sequence[tuple[str, ...]], counts: Sequence[Counts]) -> list[Encoded | None]:
        """Return the tokens of each text or pair, or None if it is dropped, and count what happened to it.

        Raises:
            DataError: if a text is far longer than any model reads.
        """
        results: list[Encoded | None] = []
        for given, count in zip(texts, counts, strict=True):
            require_short(given)
            made = self._encode(given)
            if len(made.ids) > self._max_length:
                if self._truncation == "drop":
                    count.dropped_long += 1
                    results.append(None)
                    continue
                count.truncated += 1
                made = self._encode(given, truncation=True, max_length=self._max_length)
            results.append(made)
        return results

    def pieces(self, text: str, count: Counts) -> list[Encoded]:
        """Return the tokens of a text; with ``data.truncation=split`` in as many pieces as it needs.

        Raises:
            DataError: as `__call__`.
        """
        if self._truncation != "split":
            (one,) = self([(text,)], [count])
            return [] if one is None else [one]
        require_short((text,))
        made = self._encodings((text,), truncation=True, max_length=self._max_length, return_overflowing_tokens=True)
        count.truncated += len(made) > 1
        return made

    def _encode(self, texts: tuple[str, ...], **cut: object) -> Encoded:
        return self._encodings(texts, **cut)[0]

    def _encodings(self, texts: tuple[str, ...], **cut: object) -> list[Encoded]:
        made = self._tokenizer(*([text] for text in texts), verbose=False, **cut)  # type: ignore[arg-type]
        return [
            Encoded(
                np.array(one.ids, dtype=np.int32), np.array(one.type_ids, dtype=np.int32),
                np.array(one.offsets, dtype=np.int64).reshape(-1, 2), np.array(one.special_tokens_mask, dtype=bool),
                np.array([-1 if word is None else word for word in one.word_ids], dtype=np.int32),
            )
            for one in made.encodings or ()
        ]  # fmt: skip


def require_short(texts: tuple[str, ...]) -> None:
    """Check that a row's texts can be tokenized at once.

    Raises:
        DataError: if they are far longer than any model reads.
    """
    if (size := sum(map(len, texts))) > LONGEST:
        raise DataError(f"a text has {size} characters, and at most {LONGEST} are tokenized; shorten the row")


def text_in(values: Mapping[str, Any], name: str) -> str:
    """Return a row's text in the column ``name``.

    Raises:
        DataError: if there is none, or it is empty.
    """
    if values.get(name) is None:
        raise DataError(f"the row has no {name!r} (data.columns can rename another column to it)")
    text = text_of(values[name])
    if not text.strip():
        raise DataError(f"the {name} is empty")
    return text


def key_of(*texts: str) -> int:
    """Return a hash of texts, 64 bits."""
    text = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def digest_of(*parts: bytes) -> bytes:
    """Return a digest of a row's content."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def within_positions(data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> DataSettings:
    """Return the settings with ``data.max_length`` at most what the model has positions for.

    The tokenizer's own limit counts too: it leaves out positions that a model keeps for padding (RoBERTa).
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if isinstance(limit, int) and limit > 0]
    return replace(data, max_length=min([data.max_length, *limits]))


def pad_token(config: PreTrainedConfig) -> int:
    """Return the id that pads rows: the model's padding token, or else the one that ends a text."""
    text = config.get_text_config()
    for value in (getattr(text, key, None) for key in ("pad_token_id", "eos_token_id")):  # images have none
        one = value[0] if isinstance(value, list) and value else value
        if isinstance(one, int) and one >= 0:
            return one
    return 0
