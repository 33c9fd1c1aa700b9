"""Images in conversations: which ones a row names and where, and how a chat template gets them.

Rows are read as any others (`fsdp_qlora.data.chat`), with a mark in the text where an image is. The template then gets
the message as the row has it: a list of parts, with ``{"type": "image"}`` for each mark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from fsdp_qlora.data.messages import Message, decoded
from fsdp_qlora.data.template import ChatTemplate
from fsdp_qlora.errors import DataError

_IMAGE, _PART = "\ufdd0", "\ufdd1"
"""Marks of an image, and before each part of a message: characters that Unicode keeps for a program's own use."""
PLACEHOLDER = "<image>"
"""Where an image of the columns ``images`` or ``image`` is, in a text."""
_TURNS, _CONTENTS = ("messages", "conversations", "prompt", "completion"), ("content", "value")
_PATHS = ("path", "image")
"""Keys of a part that name its image, as transformers' chat format has them."""


def marked(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a row with marks instead of its images, and the images' paths in the order of the marks.

    Raises:
        DataError: if an image is not named by a path, or there are more or fewer marks than images.
    """
    beside = _beside(values)
    row = {name: values[name] for name in values if name not in ("image", "images")}
    paths: list[str] = []
    rest = iter(beside)
    for column in _TURNS:
        turns = decoded(row.get(column))
        if isinstance(turns, list):
            row[column] = [_marked_turn(turn, bool(beside), rest, paths) for turn in turns]
    if left := list(rest):
        raise DataError(
            f"the row names {len(beside)} images, and its messages have a place for {len(beside) - len(left)}: each "
            f'needs {PLACEHOLDER} in a text, or a part {{"type": "image"}}'
        )
    return row, paths


def _beside(values: Mapping[str, Any]) -> list[Any]:
    """Return the images that a row names beside its messages."""
    several, single = decoded(values.get("images")), values.get("image")
    if several is None:
        return [] if single is None else [single]
    if not isinstance(several, list) or single is not None:
        raise DataError("'images' must be a list of paths, and 'image' then left out")
    return several


def _marked_turn(turn: Any, beside: bool, rest: Iterator[Any], paths: list[str]) -> Any:
    turn = decoded(turn)
    if not isinstance(turn, Mapping):
        return turn
    made = dict(turn)
    for key in _CONTENTS:
        content = made.get(key)
        if isinstance(content, list):
            pieces = [_marked_part(part, beside, rest, paths) for part in content]
            made[key] = "".join(_PART + piece for piece in pieces) if any(pieces) else ""
        elif isinstance(content, str):
            text = _clean(content)
            made[key] = _placed(text, rest, paths) if beside and PLACEHOLDER in text else text
    return made


def _marked_part(part: Any, beside: bool, rest: Iterator[Any], paths: list[str]) -> str:
    """Return a part's text, or the mark of an image, whose path is added to ``paths``."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise DataError(f"expected text or a list of its parts, got {type(part).__name__} as a part")
    kind = part.get("type", "text")
    if kind in ("image", "image_url"):
        paths.append(_path_in(part, kind, rest))
        return _IMAGE
    text = part.get("text")
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise DataError(f"a part of the content has type {kind!r}; only text and images can be learned")
    return _clean(text)


def _path_in(part: Mapping[str, Any], kind: str, rest: Iterator[Any]) -> str:
    named = [part[key] for key in _PATHS if part.get(key) is not None]
    if kind == "image_url" or part.get("url") is not None or part.get("base64") is not None:
        raise DataError(
            "an image is given by a URL or as base64; only files are read: write it to one, and name that as "
            '{"type": "image", "path": ...}'
        )
    return _path(named[0] if named else _next(rest))


def _placed(text: str, rest: Iterator[Any], paths: list[str]) -> str:
    """Return a text as parts: a mark for each `PLACEHOLDER`, and what is between them."""
    first, *others = text.split(PLACEHOLDER)
    pieces = [first] if first else []
    for other in others:
        paths.append(_path(_next(rest)))
        pieces += [_IMAGE, other] if other else [_IMAGE]
    return "".join(_PART + piece for piece in pieces)


def _next(rest: Iterator[Any]) -> Any:
    for path in rest:
        return path
    raise DataError("the messages have a place for an image that the row does not name")


def _path(value: Any) -> str:
    """Return the path of an image.

    Raises:
        DataError: if it is none.
    """
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and not value.get("bytes"):
        value = value["path"]
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataError(f"expected the path of an image file, got {str(value)[:80]!r}")
    if "://" in value or value.startswith("data:"):
        raise DataError(f"the image {value[:80]!r} is a URL or base64; only files are read: write it to one")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError("the name of an image file is not valid UTF-8; rename it") from error
    return value


def _clean(text: str) -> str:
    if _IMAGE in text or _PART in text:
        raise DataError("the text holds U+FDD0 or U+FDD1, which are no characters; remove them")
    return text


class PartsTemplate(ChatTemplate):
    """A chat template that gets messages with images as lists of parts.

    A template that only reads parts (LLaVA's) gets texts as one part, too: it would drop them without a word.
    """

    @cached_property
    def _only_parts(self) -> bool:
        """Whether the template writes texts only as parts; like any rendering, found out in a process of its own."""
        probe = "Zqxj7"
        return not self._writes(probe, probe) and self._writes([_text(probe)], probe)

    def _writes(self, content: Any, text: str) -> bool:
        try:
            return text in str(
                self._tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            )
        except Exception:  # a template is a program and may raise anything
            return False

    def given(self, message: Message) -> Message:
        """Return a message whose content is text, or parts where the row has parts."""
        content = message.get("content")
        if not isinstance(content, str) or not (content.startswith(_PART) or self._only_parts):
            return message
        pieces = content.removeprefix(_PART).split(_PART)
        return {**message, "content": [{"type": "image"} if piece == _IMAGE else _text(piece) for piece in pieces]}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
