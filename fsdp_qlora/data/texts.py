"""Texts, and pairs of texts, as a tokenizer encodes them for an encoder or a classifier: with its special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fsdp_qlora.data.encoder import Counts
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
            if (size := sum(map(len, given))) > LONGEST:
                raise DataError(f"a text has {size} characters, and at most {LONGEST} are tokenized; shorten the row")
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

    def _encode(self, texts: tuple[str, ...], **cut: object) -> Encoded:
        encoding = self._tokenizer(*texts, return_token_type_ids=True, verbose=False, **cut)  # type: ignore[arg-type]
        ids = np.array(encoding["input_ids"], dtype=np.int32)
        return Encoded(ids, np.array(encoding["token_type_ids"], dtype=np.int32))


def key_of(*texts: str) -> int:
    """Return a hash of texts, 64 bits."""
    text = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def digest_of(*parts: bytes) -> bytes:
    """Return a digest of a row's content."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def pad_token(config: PreTrainedConfig) -> int:
    """Return the id that pads rows: the model's padding token, or else the one that ends a text."""
    text = config.get_text_config()
    for value in (getattr(text, key, None) for key in ("pad_token_id", "eos_token_id")):  # images have none
        one = value[0] if isinstance(value, list) and value else value
        if isinstance(one, int) and one >= 0:
            return one
    return 0
