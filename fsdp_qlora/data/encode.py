"""Examples -> token ids and, for each token, whether it is learned.

The mask comes from rendering the conversation's own prefixes, not from token ids (pad may equal eos) and not from
``{% generation %}`` blocks (most templates have none). Texts are tokenized in batches, with all cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example, Message
from fsdp_qlora.errors import DataError

TrainOn = Literal["assistant", "last", "all"]
"""What is learned: every answer, the last one, or every token."""


@dataclass(frozen=True)
class _Part:
    """A piece of text that is tokenized by itself, and the characters of it that are learned (None = all)."""

    text: str
    special: bool
    """Whether the tokenizer adds its own special tokens."""
    spans: list[tuple[int, int]] | None
    ends: bool = False
    """Whether the end-of-text token follows."""


Encoded = tuple[np.ndarray, np.ndarray]
"""int32 ids and bool learned, both ``[length]``."""


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant") -> Encoded:
    """Encode one example.

    Raises:
        DataError: if it cannot be rendered.
    """
    (result,) = encode_batch([example], tokenizer, train_on)
    if isinstance(result, DataError):
        raise result
    return result


def encode_batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant"
) -> list[Encoded | DataError]:
    """Encode examples together; what is wrong with one is its own result."""
    plans: list[list[_Part] | DataError] = []
    for example in examples:
        try:
            plans.append(_plan(example, tokenizer, train_on))
        except DataError as error:
            plans.append(error)
    parts = [part for plan in plans if not isinstance(plan, DataError) for part in plan]
    encoded: dict[int, Encoded] = {}
    for special in (False, True):
        chosen = [part for part in parts if part.special == special]
        if chosen:
            texts = [part.text for part in chosen]
            found = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            for number, part in enumerate(chosen):
                offsets = np.array(found["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
                encoded[id(part)] = _finish(part, np.array(found["input_ids"][number], np.int32), offsets, tokenizer)
    return [plan if isinstance(plan, DataError) else _join([encoded[id(part)] for part in plan]) for plan in plans]


def _finish(part: _Part, ids: np.ndarray, offsets: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    learned = np.full(len(ids), part.spans is None)
    for start, stop in part.spans or []:
        learned |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0])
    end = tokenizer.eos_token_id
    if part.ends and isinstance(end, int) and (not len(ids) or ids[-1] != end):
        ids, learned = np.append(ids, np.int32(end)), np.append(learned, True)
    return ids, learned


def _join(pieces: list[Encoded]) -> Encoded:
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate([learned for _, learned in pieces])


def _plan(example: Example, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> list[_Part]:
    if example.messages:
        return [_chat_part(example, tokenizer, train_on)]
    completion = _Part(example.completion, not example.prompt, None, ends=True)
    if not example.prompt:
        return [completion]
    return [_Part(example.prompt, True, None if train_on == "all" else []), completion]


def _chat_part(example: Example, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> _Part:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so conversations cannot be rendered; set data.template, or use "
            "prompt/completion"
        )
    text = _render(example.messages, example, tokenizer)
    if train_on == "all":
        return _Part(text, False, None)
    turns = [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]
    turns = turns[-1:] if train_on == "last" else turns
    return _Part(text, False, [_learned_span(example, turn, text, tokenizer) for turn in turns])


def _render(messages: list[Message], example: Example, tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    settings: dict[str, Any] = {} if example.tools is None else {"tools": example.tools}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **settings)
    except Exception as error:  # a template is a program: whatever it raises is about this row
        raise DataError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
    assert isinstance(text, str)
    return text


def _learned_span(example: Example, turn: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the characters of ``text`` from the first word of an answer to the end of its end-of-turn token."""
    messages = example.messages
    before = _render(messages[:turn], example, tokenizer, prompt=True)
    after = text if turn == len(messages) - 1 else _render(messages[: turn + 1], example, tokenizer)
    if not (text.startswith(before) and text.startswith(after)):
        raise DataError(
            "the chat template rewrites earlier turns when later ones are added, so the answer's tokens cannot be told "
            f"apart (turn {turn + 1}); use a template that only appends"
        )
    answer = after[len(before) :]
    ends = [answer.rfind(token) + len(token) for token in tokenizer.all_special_tokens if token in answer]
    # What a template writes after the end-of-turn token (a line break) is not the model's to say.
    return len(before), len(before) + (max(ends) if ends else len(answer))
