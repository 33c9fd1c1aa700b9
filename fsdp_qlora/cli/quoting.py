"""Quotes text for Hydra's grammar and for a shell, so that it arrives unchanged."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

_INTERPOLATION = re.compile(r"(\\*)\$\{")
_QUOTE_OR_END = re.compile(r"(\\*)('|\Z)")


def literal(text: str) -> str:
    """Return text in single quotes for Hydra's grammar.

    A backslash has a meaning only before a quote, including the closing one at the end.
    """
    return "'" + _QUOTE_OR_END.sub(lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def quoted(value: Any) -> str:
    """Return a value quoted for Hydra, with ``${`` escaped, which OmegaConf would read as an interpolation."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ",".join(quoted(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(item)}" for key, item in value.items()) + "}"
    return literal(_INTERPOLATION.sub(lambda match: match[1] * 2 + "\\${", str(value)))


def command(*words: str) -> str:
    """Return an `fsdp-qlora` command line that can be pasted into a shell."""
    return shlex.join(["fsdp-qlora", *words])


def list_of_names(text: str) -> list[str]:
    """Return the items of ``[a,b]`` as typed; quotes protect a comma inside an item."""
    return [item for item in _items(text[1:-1]) if item]


def _items(text: str) -> Iterator[str]:
    for match in re.finditer(r"""\s*(?:'([^']*)'|"([^"]*)"|([^,]*))\s*(?:,|\Z)""", text):
        yield next((part for part in match.groups() if part is not None), "").strip()


def mapping_of_names(text: str) -> dict[str, str] | None:
    """Return the items of ``{a: x, b: y}`` as typed, or None if it is not of this form; quotes protect a comma."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    item = r"""\s*([\w-]+)\s*:\s*(?:'([^']*)'|"([^"]*)"|([^,]*?))\s*"""
    if re.fullmatch(rf"(?:{item},)*{item}", text[1:-1]) is None:
        return None
    return {m[1]: next(v for v in m.groups()[1:] if v is not None) for m in re.finditer(rf"{item}(?:,|\Z)", text[1:-1])}


def sweep_hint(key: str, text: str, is_list: bool, flags: Sequence[str]) -> str | None:
    """Return the message for ``key=a,b`` without ``--multirun``, or None if a sweep was requested."""
    if "--multirun" in flags or "-m" in flags:
        return None
    values = text.partition("=")[2]
    each = f"to run once with each value, add --multirun. ({key} got {values})"
    return f"{key}: write a list as {shlex.quote(f'{key}=[{values}]')}; {each}" if is_list else f"{key}: {each}"
