"""Rows -> conversations or texts, for each known format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fsdp_qlora.config.auto import asked
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
    """Tools available to the conversation, in the form that the chat template expects."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other variables of the chat template (``chat_template_kwargs`` of the row)."""
    not_learned: frozenset[int] = frozenset()
    """Indices of the messages that the row excludes from the loss."""
    num_prompt: int = 0
    """Number of leading messages that form the prompt of a completion; answers among them are not learned."""

    @property
    def prompt_key(self) -> str:
        """The text before the first answer; rows with the same key go to the same side of the evaluation split."""
        if not self.messages:
            return self.prompt or self.completion
        before = []
        for message in self.messages:
            if message["role"] == "assistant":
                break
            before.append(f"{message['role']}:{message['content']}")
        return "\n".join(before or [str(message["content"]) for message in self.messages])


def find_format(columns: Iterable[str]) -> str:
    """Return the format that the columns match.

    Raises:
        DataError: if they match none.
    """
    have = set(columns)
    for name, choices in _FORMATS.items():
        if any(needed <= have for needed in choices):
            return name
    raise DataError(
        f"data.format: the columns {', '.join(sorted(have))} are none of: messages; conversations; instruction, "
        "output; prompt, completion; prompt, chosen, rejected; text. data.columns can map other names."
    )


def read_row(row: Mapping[str, Any], row_format: str, ignored: frozenset[str] = frozenset()) -> Example:
    """Convert a row to an `Example`; with ``auto``, the row's own columns decide its format.

    Args:
        row: the row's columns.
        row_format: `DataSettings.format`.
        ignored: message keys to drop.

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
        raise DataError(f"the row does not match data.format={row_format}: {error}") from error
    for number, message in enumerate(example.messages, start=1):
        if message["role"] == "assistant" and not message["content"] and not payload_of(message):
            raise DataError(f"the assistant's turn (message {number}) is empty")
    if not example.messages and not example.completion:
        raise DataError("there is no text to learn")
    return example


def _format_of(row: Mapping[str, Any]) -> str:
    """Return the format of a row, ignoring null columns, which may exist only because other rows have them."""
    try:
        return find_format(column for column in row if column in _COLUMNS and not _is_null(row, column))
    except DataError:
        return find_format(row)


def _is_null(row: Mapping[str, Any], column: str) -> bool:
    try:
        return row[column] is None
    except DataError:  # present but unreadable: the format's reader reports it, if it needs the column
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
    """Return the turns that precede an Alpaca row's own, from pairs of question and answer."""
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
    """Read the prompt and the chosen answer; the rejected one is not used."""
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
    """Return a tool with the parts that were stored as JSON decoded to objects."""
    tool = decoded(tool)
    if not isinstance(tool, Mapping):
        return tool
    return {key: _tool(part) if key in ("function", "parameters") else part for key, part in tool.items()}
