"""Messages of a row -> messages for a chat template, each with whether it is learned.

A key other than role and content is known metadata, or decides whether the message is learned, or is passed to the
template. `fsdp_qlora.data.template` rejects keys that the template does not write, so that nothing meant for the model
is silently lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.errors import DataError

Message = dict[str, Any]

HARMLESS = frozenset(
    {
        "name", "tool_call_id", "id", "message_id", "msg_id", "uuid", "parent", "parent_id", "conversation_id", "turn",
        "turn_id", "turn_identifier", "idx", "index", "position", "timestamp", "time", "date", "datetime", "created",
        "created_at", "create_time", "updated_at", "update_time", "author", "user", "user_id", "username", "user_agent",
        "model", "model_name", "model_slug", "finish_reason", "usage", "num_tokens", "token_count", "status", "source",
        "url", "lang", "language", "country", "state", "header", "hashed_ip", "ip_hash", "redacted", "toxic",
        "toxicity", "moderation", "openai_moderation", "rating", "score", "rank", "tags", "category", "topic",
        "annotations", "metadata", "meta", "end_turn", "object",
    }
)  # fmt: skip
"""Metadata that does not change what is learned; a template may still write it."""
_SWITCHES = ("weight", "train", "training", "trainable", "learn", "loss")
"""Keys that other trainers use to include or exclude an assistant's message: 0 or 1, false or true."""
_READ = frozenset({"role", "content", *_SWITCHES})
_READ_SHAREGPT = frozenset({"from", "value", *_SWITCHES})
_NOTHING = (None, "", [], {})
_ROLES = ("system", "user", "assistant", "tool", "developer")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message, and whether the row allows it to be learned."""

    message: Message
    learned: bool = True

    @staticmethod
    def of(role: str, content: Any) -> Turn:
        """Return a turn whose message has only a role and text."""
        return Turn({"role": role, "content": text_of(content)})


def read_turn(turn: Any, ignored: frozenset[str] = frozenset()) -> Turn:
    """Read a message with the keys ``role`` and ``content`` (OpenAI), or ``from`` and ``value`` (ShareGPT).

    Args:
        turn: the message, as an object or as JSON.
        ignored: keys to drop.

    Raises:
        DataError: if the role is unknown, the content is not text, or a key like ``weight`` has an unsupported value.
    """
    turn = decoded(turn)
    if not isinstance(turn, Mapping):
        raise TypeError(f"expected a message {{...}}, got {type(turn).__name__}")
    if not {"role", "from"} & turn.keys():
        raise DataError(
            f"a turn has the keys {', '.join(map(str, turn))}, but neither role and content nor from and value; "
            "data.row_function can rename them"
        )
    sharegpt = "role" not in turn
    content_key, read = ("value", _READ_SHAREGPT) if sharegpt else ("content", _READ)
    role = _sharegpt_role(turn["from"]) if sharegpt else _role(turn["role"])
    extra = {
        key: value for key, value in turn.items() if key not in read and key not in ignored and value not in _NOTHING
    }
    for key in ("tool_calls", "function_call"):
        if key in extra:
            extra[key] = _calls(decoded(extra[key]))
    content = turn.get(content_key)
    if content is None:
        content = "" if payload_of(extra) else turn[content_key]
    switches = {key: turn[key] for key in _SWITCHES if key not in ignored and turn.get(key) is not None}
    return Turn({"role": role, "content": _content(content), **extra}, _is_learned(role, switches))


def payload_of(message: Message) -> list[str]:
    """Return the keys of a message other than role and content that are meant for the model."""
    return [key for key in message if key not in ("role", "content") and key not in HARMLESS]


def text_of(value: Any) -> str:
    """Check that ``value`` is valid text, and return it.

    Raises:
        DataError: if it is not a string, or contains NUL or lone surrogates.
    """
    if not isinstance(value, str):
        raise DataError(f"expected text, got {type(value).__name__}")
    if "\0" in value:
        raise DataError("the text holds a NUL character")
    require_unicode(value)
    return value


def require_unicode(text: str) -> None:
    """Reject lone surrogates, which also stand for bytes that were not valid UTF-8.

    Raises:
        DataError: if there is one, saying which and where.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # Python's surrogateescape for a byte that it could not decode
            what = f"the byte 0x{code - 0xDC00:02X} is not valid UTF-8; save the file as UTF-8"
        else:
            what = f"\\u{code:04x} is half a character (a lone surrogate)"
        raise DataError(f"the text cannot be encoded: at character {error.start + 1}, {what}") from error


def decoded(value: Any) -> Any:
    """Decode a JSON object or array; return anything else unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _content(value: Any) -> str:
    """Return a message's text, joining its parts if it is a list."""
    if isinstance(value, list):
        return "".join(_part(part, number) for number, part in enumerate(value, start=1))
    return text_of(value)


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return text_of(part)
    if not isinstance(part, Mapping):
        raise DataError(f"expected text or a list of its parts, got {type(part).__name__} as part {number}")
    kind = part.get("type", "text")
    unknown = [key for key, value in part.items() if key not in ("type", "text", "cache_control") and value is not None]
    if kind not in ("text", "input_text", "output_text"):
        raise DataError(f"part {number} of the content has type {kind!r}; only text can be learned")
    if unknown and "text" not in part:
        names = ", ".join(map(str, unknown))
        raise DataError(f"part {number} of the content has no 'text', only {names}; only text can be learned")
    return text_of(part.get("text"))


def _role(role: Any) -> str:
    if role not in _ROLES:
        raise DataError(f"unknown role {role!r}; known roles are {', '.join(_ROLES)}")
    return role


def _sharegpt_role(role: Any) -> str:
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise DataError(f"unknown role {role!r}; known roles are {', '.join(_SHAREGPT_ROLES)}")
    return _SHAREGPT_ROLES[role]


def _calls(value: Any) -> Any:
    """Return tool calls with their arguments decoded from JSON, since most templates encode them again."""
    if isinstance(value, list):
        return [_calls(decoded(call)) for call in value]
    if not isinstance(value, Mapping):
        return value
    call = dict(value)
    if "function" in call:
        call["function"] = _calls(decoded(call["function"]))
    if "arguments" in call:
        call["arguments"] = decoded(call["arguments"])
    return call


def _is_learned(role: str, switches: Mapping[str, Any]) -> bool:
    learned = True
    for key, value in switches.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{key!r} is {value!r} in a message, but only 0 and 1 (not learned, learned) are supported; "
                f"data.ignore_keys=[{key}] drops the key"
            )
        if role != "assistant" and value:
            raise DataError(
                f"{key!r} asks to learn a {role} message, but only the assistant's are learned; "
                f"data.ignore_keys=[{key}] drops the key, data.train_on=all learns everything"
            )
        learned = learned and bool(value)
    return learned
