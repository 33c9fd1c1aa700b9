"""Rows -> conversations or texts: what each known format means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fsdp_qlora.config.decided import asked
from fsdp_qlora.data.messages import Message, Turn, decoded, payload_of, read_turn, text_of
from fsdp_qlora.errors import DataError

_FORMATS = {
    "preference": [{"prompt", "chosen", "rejected"}, {"conversations", "chosen", "rejected"}, {"chosen", "rejected"}],
    "messages": [{"messages"}],
    "conversations": [{"conversations"}],
    "alpaca": [{"instruction", "output"}],
    "prompt_completion": [{"prompt", "completion"}],
    "text": [{"text"}],
}
_COLUMNS = {column for choices in _FORMATS.values() for needed in choices for column in needed}


@dataclass(frozen=True)
class Example:
    """One row: a conversation, or a prompt and its continuation (plain text has an empty prompt)."""

    messages: list[Message] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    tools: list[Any] | None = None
    """Tools that the conversation may call, as the chat template takes them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other variables of the chat template (``chat_template_kwargs`` of the row)."""
    not_learned: frozenset[int] = frozenset()
    """Numbers, from 0, of the messages that the row says not to learn."""
    num_prompt: int = 0
    """Messages at the start that are the prompt of a completion, whose answers are not learned."""

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
        return "\n".join(before or [str(message["content"]) for message in self.messages])


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


def read_row(row: Mapping[str, Any], row_format: str, ignored: frozenset[str] = frozenset()) -> Example:
    """Turn a row into an `Example`; ``auto`` goes by the row's own columns.

    Args:
        row: the row's columns.
        row_format: `DataSettings.format`.
        ignored: keys of messages to leave out.

    Raises:
        DataError: if a needed column is missing or has the wrong type, or an answer is empty.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected a row {{...}}, got {type(row).__name__}")
    row_format = asked(row_format) or _format_of(row)
    try:
        example = _READERS[row_format](row, ignored)
    except KeyError as error:
        raise DataError(f"the row has no {error.args[0]!r} (data.format={row_format})") from error
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"the row is not of the form data.format={row_format}: {error}") from error
    for number, message in enumerate(example.messages, start=1):
        if message["role"] == "assistant" and not message["content"] and not payload_of(message):
            raise DataError(f"the assistant's turn (message {number}) is empty")
    if not example.messages and not example.completion:
        raise DataError("there is no text to learn")
    return example


def _format_of(row: Mapping[str, Any]) -> str:
    """Return the format of a row: columns that are there because other rows have them say nothing."""
    try:
        return find_format(column for column in row if column in _COLUMNS and not _is_null(row, column))
    except DataError:
        return find_format(row)


def _is_null(row: Mapping[str, Any], column: str) -> bool:
    try:
        return row[column] is None
    except DataError:  # it is there, and cannot be read: its format's reader says so, if it needs it
        return False


def _example(turns: list[Turn], row: Mapping[str, Any]) -> Example:
    settings = decoded(row.get("chat_template_kwargs")) or {}
    if not isinstance(settings, Mapping):
        raise TypeError(f"expected an object in chat_template_kwargs, got {type(settings).__name__}")
    return Example(
        [turn.message for turn in turns],
        tools=_tools(row),
        settings=dict(settings),
        not_learned=frozenset(number for number, turn in enumerate(turns) if not turn.learned),
    )


def _turns(value: Any, ignored: frozenset[str]) -> list[Turn]:
    value = decoded(value)
    if not isinstance(value, list):
        raise TypeError(f"expected a list of turns, got {type(value).__name__}")
    return [read_turn(turn, ignored) for turn in value]


def _messages(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    return _example(_turns(row["messages"], ignored), row)


def _conversations(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    return _example(_with_system(row, _turns(row["conversations"], ignored)), row)


def _alpaca(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    turns = [*_history(row.get("history")), Turn.of("user", prompt), Turn.of("assistant", row["output"])]
    return _example(_with_system(row, turns), row)


def _history(value: Any) -> list[Turn]:
    """Return the turns before an Alpaca row's own: pairs of question and answer."""
    turns = []
    for question, answered in decoded(value) or []:
        turns += [Turn.of("user", question), Turn.of("assistant", answered)]
    return turns


def _prompt_completion(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    if isinstance(row["prompt"], list):
        prompt = _turns(row["prompt"], ignored)
        return replace(_example(prompt + _turns(row["completion"], ignored), row), num_prompt=len(prompt))
    return Example(prompt=text_of(row["prompt"]), completion=text_of(row["completion"]))


def _text_row(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    return Example(completion=text_of(row["text"]))


def _preference(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    """Read the prompt and the chosen answer; the rejected one is for objectives that compare."""
    chosen = row["chosen"]
    if row.get("conversations") is not None:
        before = _with_system(row, _turns(row["conversations"], ignored))
        return _example([*before, _answer(chosen, ignored)], row)
    if isinstance(chosen, list):
        prompt = row.get("prompt") or []
        before = [Turn.of("user", prompt)] if isinstance(prompt, str) else _turns(prompt, ignored)
        turns = _turns(chosen, ignored)
        return _example(turns if turns[: len(before)] == before else [*before, *turns], row)
    return Example(prompt=text_of(row["prompt"]), completion=text_of(chosen))


def _answer(value: Any, ignored: frozenset[str]) -> Turn:
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        return read_turn(value, ignored)
    return Turn.of("assistant", value["value"] if isinstance(value, Mapping) else value)


_READERS = {
    "messages": _messages, "conversations": _conversations, "alpaca": _alpaca, "text": _text_row,
    "prompt_completion": _prompt_completion, "preference": _preference,
}  # fmt: skip


def _with_system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    return [Turn.of("system", row["system"]), *turns] if row.get("system") else turns


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"'tools' is not valid JSON: {error}") from error
    if not tools:
        return None
    return [_tool(tool) for tool in (tools if isinstance(tools, list) else [tools])]


def _tool(tool: Any) -> Any:
    """Return a tool whose parts are objects, also where they were stored as JSON."""
    tool = decoded(tool)
    if not isinstance(tool, Mapping):
        return tool
    return {key: _tool(part) if key in ("function", "parameters") else part for key, part in tool.items()}
