"""Rows -> text with the spans that are learned: the assistant's words and the token that ends its turn.

The mask comes from rendering the conversation's own prefixes, not from token ids (pad may equal eos) and not from
``{% generation %}`` blocks (most templates have none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.errors import DataError

Message = dict[str, str]

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Example:
    """One row: a conversation, or a prompt and its continuation (plain text has an empty prompt)."""

    messages: list[Message] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""

    @property
    def prompt_key(self) -> str:
        """What the answer is an answer to; rows with the same key stay on one side of the split."""
        if not self.messages:
            return self.prompt or self.completion
        before = []
        for message in self.messages:
            if message["role"] == "assistant":
                break
            before.append(f"{message['role']}:{message['content']}")
        return "\n".join(before)


def find_format(columns: list[str]) -> str:
    """Return the format that the columns mean.

    Raises:
        DataError: if they mean none.
    """
    have = set(columns)
    for name, needed in {
        "messages": {"messages"},
        "conversations": {"conversations"},
        "alpaca": {"instruction", "output"},
        "prompt_completion": {"prompt", "completion"},
        "text": {"text"},
    }.items():
        if needed <= have:
            return name
    raise DataError(
        f"data.format: the columns {', '.join(columns)} are none of: messages; conversations; instruction, input, "
        "output; prompt, completion; text."
    )


def read_row(row: Mapping[str, Any], row_format: str) -> Example:
    """Turn a row into an `Example`.

    Raises:
        DataError: if a needed column is missing or has the wrong type.
    """
    try:
        if row_format == "messages":
            return Example(messages=[_message(m["role"], m["content"]) for m in row["messages"]])
        if row_format == "conversations":
            return Example(messages=[_message(_sharegpt_role(m["from"]), m["value"]) for m in row["conversations"]])
        if row_format == "alpaca":
            prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
            return Example(messages=[_message("user", prompt), _message("assistant", row["output"])])
        if row_format == "prompt_completion":
            return Example(prompt=_text(row["prompt"]), completion=_text(row["completion"]))
        return Example(completion=_text(row["text"]))
    except KeyError as error:
        raise DataError(f"the row has no {error.args[0]!r} (data.format={row_format})") from error
    except TypeError as error:
        raise DataError(f"the row is not of the form data.format={row_format}: {error}") from error


def _message(role: str, content: Any) -> Message:
    if role not in _ROLES:
        raise DataError(f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    return {"role": role, "content": _text(content)}


def _sharegpt_role(role: str) -> str:
    if role not in _SHAREGPT_ROLES:
        raise DataError(f"unknown role {role!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    return _SHAREGPT_ROLES[role]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"expected text, got {type(value).__name__}")
    return value


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Return token ids and, for each, whether it is learned."""
    if example.messages:
        return _encode_chat(example.messages, tokenizer)
    prompt = tokenizer(example.prompt, add_special_tokens=True).input_ids if example.prompt else []
    completion = tokenizer(example.completion, add_special_tokens=not example.prompt).input_ids
    if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, tokenizer.eos_token_id]
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _encode_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so conversations cannot be rendered; use prompt/completion"
        )
    text = _render(messages, tokenizer)
    spans = [
        _learned_span(messages, turn, text, tokenizer) for turn, m in enumerate(messages) if m["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(a <= start and end <= b and end > start for a, b in spans) for start, end in encoded.offset_mapping]
    return encoded.input_ids, learned


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def _learned_span(messages: list[Message], turn: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the characters of ``text`` from the first word of an answer to the end of its end-of-turn token."""
    before = _render(messages[:turn], tokenizer, prompt=True)
    after = _render(messages[: turn + 1], tokenizer)
    if not (text.startswith(before) and text.startswith(after)):
        raise DataError(
            "the chat template rewrites earlier turns when later ones are added, so the answer's tokens cannot be told "
            f"apart (turn {turn + 1}); use a template that only appends"
        )
    answer = after[len(before) :]
    ends = [answer.rfind(token) + len(token) for token in tokenizer.all_special_tokens if token in answer]
    # What a template writes after the end-of-turn token (a line break) is not the model's to say.
    return len(before), len(before) + (max(ends) if ends else len(answer))
