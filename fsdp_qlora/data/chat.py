"""Rows -> conversations or texts: what each known format means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fsdp_qlora.errors import DataError

Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool", "developer")
_FORMATS = {
    "preference": [{"prompt", "chosen", "rejected"}, {"conversations", "chosen", "rejected"}, {"chosen", "rejected"}],
    "messages": [{"messages"}],
    "conversations": [{"conversations"}],
    "alpaca": [{"instruction", "output"}],
    "prompt_completion": [{"prompt", "completion"}],
    "text": [{"text"}],
}


@dataclass(frozen=True)
class Example:
    """One row: a conversation, or a prompt and its continuation (plain text has an empty prompt)."""

    messages: list[Message] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    tools: list[Any] | None = None
    """Tools that the conversation may call, as the chat template takes them."""

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


def find_format(columns: Iterable[str]) -> str:
    """Return the format that the columns mean.

    Raises:
        DataError: if they mean none.
    """
    have = set(columns)
    for name, choices in _FORMATS.items():
        if any(needed <= have for needed in choices):
            return name
    raise DataError(
        f"data.format: the columns {', '.join(sorted(have))} are none of: messages; conversations; instruction, input, "
        "output; prompt, completion; prompt, chosen, rejected; text. data.columns can map other names."
    )


def read_row(row: Mapping[str, Any], row_format: str) -> Example:
    """Turn a row into an `Example`; ``auto`` goes by the row's own columns.

    Raises:
        DataError: if a needed column is missing or has the wrong type, or an answer is empty.
    """
    if row_format == "auto":
        row_format = find_format(row)
    try:
        example = _READERS[row_format](row)
    except KeyError as error:
        raise DataError(f"the row has no {error.args[0]!r} (data.format={row_format})") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"the row is not of the form data.format={row_format}: {error}") from error
    for number, message in enumerate(example.messages, start=1):
        if message["role"] == "assistant" and not message["content"] and not message.get("tool_calls"):
            raise DataError(f"the assistant's turn (message {number}) is empty")
    if not example.messages and not example.completion:
        raise DataError("there is no text to learn")
    return example


def _messages(row: Mapping[str, Any]) -> Example:
    return Example([_openai(m) for m in _list(row["messages"])], tools=_tools(row))


def _conversations(row: Mapping[str, Any]) -> Example:
    turns = [_message(_sharegpt_role(m["from"]), m["value"]) for m in _list(row["conversations"])]
    return Example(_with_system(row, turns), tools=_tools(row))


def _alpaca(row: Mapping[str, Any]) -> Example:
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return Example(_with_system(row, [_message("user", prompt), _message("assistant", row["output"])]))


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    if isinstance(row["prompt"], list):
        return Example([_openai(m) for m in row["prompt"] + _list(row["completion"])], tools=_tools(row))
    return Example(prompt=_text(row["prompt"]), completion=_text(row["completion"]))


def _text_row(row: Mapping[str, Any]) -> Example:
    return Example(completion=_text(row["text"]))


def _preference(row: Mapping[str, Any]) -> Example:
    """Read the prompt and the chosen answer; the rejected one is for objectives that compare."""
    chosen = row["chosen"]
    if "conversations" in row:
        before = [_message(_sharegpt_role(m["from"]), m["value"]) for m in _list(row["conversations"])]
        return Example([*before, _message("assistant", chosen["value"] if isinstance(chosen, Mapping) else chosen)])
    if isinstance(chosen, list):
        prompt = row.get("prompt") or []
        before = [_message("user", prompt)] if isinstance(prompt, str) else [_openai(m) for m in prompt]
        return Example([*before, *(_openai(m) for m in chosen)])
    return Example(prompt=_text(row["prompt"]), completion=_text(chosen))


_READERS = {
    "messages": _messages, "conversations": _conversations, "alpaca": _alpaca, "text": _text_row,
    "prompt_completion": _prompt_completion, "preference": _preference,
}  # fmt: skip


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list of turns, got {type(value).__name__}")
    return value


def _openai(message: Mapping[str, Any]) -> Message:
    """Return an OpenAI message; a call of tools may come without content, other keys go to the template as they are."""
    calls = message.get("tool_calls")
    content = "" if calls and message.get("content") is None else message["content"]
    extra = {key: message[key] for key in ("tool_calls", "tool_call_id", "name") if message.get(key) is not None}
    return _message(message["role"], content) | extra


def _message(role: str, content: Any) -> Message:
    if role not in _ROLES:
        raise DataError(f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    return {"role": role, "content": _text(content)}


def _sharegpt_role(role: str) -> str:
    if role not in _SHAREGPT_ROLES:
        raise DataError(f"unknown role {role!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    return _SHAREGPT_ROLES[role]


def _with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    return [_message("system", row["system"]), *turns] if row.get("system") else turns


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"'tools' is not valid JSON: {error}") from error
    if not tools:
        return None
    return tools if isinstance(tools, list) else [tools]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"expected text, got {type(value).__name__}")
    if "\0" in value:
        raise DataError("the text holds a NUL character")
    return value
