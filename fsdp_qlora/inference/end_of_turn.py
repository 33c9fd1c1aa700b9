"""Where an answer ends, combined from every source that defines it.

The tokenizer, the model's config and generation_config.json each name end tokens, and often different ones (a base
model's tokenizer has an end-of-text token, while its chat template ends a turn differently). Training teaches whatever
the chat template writes after an answer; that may be none of these tokens, or not a single token at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.errors import ModelError
from fsdp_qlora.inference.rendering import render_apart
from fsdp_qlora.model.config import GENERATION

_ANSWER = "Zqxj7"
"""A placeholder answer that no template writes on its own or trims."""


@dataclass(frozen=True)
class EndOfTurn:
    """What ends an answer."""

    ids: list[int]
    """Token ids, the likeliest first."""
    text: str | None = None
    """What the chat template ends a turn with, if that is not a single token."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer because the user asked for it (``generate.stop``)."""
    keeps_space: bool = False
    """Whether white space around an answer belongs to it."""

    @property
    def texts(self) -> list[str]:
        """Every text that ends an answer."""
        return [*([self.text] if self.text else []), *self.stops]

    def cut(self, text: str) -> str:
        """Return a decoded answer up to its end; white space around it stays."""
        return text[: min((at for end in self.texts if (at := text.find(end)) >= 0), default=len(text))]

    def without(self, text: str) -> str:
        """Return a decoded answer without its end."""
        return self.cut(text) if self.keeps_space else self.cut(text).strip()


def end_of_turn(folder: Path, model_config: Any, tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """Return everything that ends an answer of the model in ``folder``."""
    learned = _learned_end(tokenizer)
    ids = [learned] if isinstance(learned, int) else []
    for named in (tokenizer.eos_token_id, _configured(model_config), _from_file(folder / GENERATION)):
        ids += _ids(named)
    return EndOfTurn(list(dict.fromkeys(ids)), learned if isinstance(learned, str) else None)


def _configured(model_config: Any) -> list[int]:
    """Return the end tokens of a config and of its text part (a multimodal model has both)."""
    parts = (model_config, model_config.get_text_config() if hasattr(model_config, "get_text_config") else None)
    return [i for part in parts for i in _ids(getattr(part, "eos_token_id", None))]


def _from_file(file: Path) -> Any:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # the file is optional
    return values.get("eos_token_id") if isinstance(values, dict) else None


def _ids(value: Any) -> list[int]:
    items: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _learned_end(tokenizer: PreTrainedTokenizerBase) -> int | str | None:
    """Return the token, or the text, that the chat template writes after an answer; None if it writes nothing.

    White space does not count as an end: answers may contain it.
    """
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render_apart(tokenizer, messages)
    except ModelError:  # rendering the prompt will report what is wrong
        return None
    _, mark, after = text.rpartition(_ANSWER)
    after = after.strip()
    if not mark or not after:
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    first = ids[0]
    if first in tokenizer.added_tokens_decoder or first in tokenizer.all_special_ids or len(ids) == 1:
        return first
    return after.splitlines()[0].strip()
