"""`VERB --help`: one line per key, with its default and meaning; `VERB --help GROUP`: a group's keys in full."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator

from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.convert import field_types, words_of
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError

_WIDTH = 100
_OF_VERBS = {"sweep": "train", "plan": "plan", "evaluate": "evaluate", "generate": "generate", "export": "export"}
"""Group -> the only verb that reads it."""


def show(verb: str, about: str, group: str | None = None) -> str:
    """Return the help text of a verb, or of one of its groups.

    Raises:
        ConfigError: if there is no such group.
    """
    kinds = field_types(RunConfig).items()
    groups = {name: typing.cast(type, kind) for name, kind in kinds if dataclasses.is_dataclass(kind)}
    if group is not None:
        if group not in groups:
            raise ConfigError(f"--help {group}: there is no such group.{nearest(group, groups)}")
        return "\n".join(_group(group, groups[group], whole=True))
    lines = [f"fsdp-qlora {verb}: {about}", "", "Settings are key=value; --help GROUP shows one group in full.", ""]
    for name, kind in groups.items():
        if _OF_VERBS.get(name, verb) == verb:
            lines += [*_group(name, kind, whole=False), ""]
    lines += [*_keys(RunConfig, "", whole=False), ""]
    lines.append("experiment=NAME applies a whole preset (conf/experiment); --cfg job prints the resulting settings.")
    return "\n".join(lines)


def _group(name: str, kind: type, whole: bool) -> list[str]:
    return [f"{name}: {_first(inspect.getdoc(kind) or '')}", *_keys(kind, f"{name}.", whole)]


def _keys(kind: type, prefix: str, whole: bool) -> Iterator[str]:
    """Yield the lines for a group's keys, each with its default and meaning."""
    documents = _documents(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(typing.cast(type, field_types(kind)[item.name])):
            continue
        missing = item.default is dataclasses.MISSING
        default = item.default_factory() if missing and callable(item.default_factory) else item.default
        words = words_of(field_types(kind)[item.name])
        text = re.sub(r"``|`", "", " ".join(documents.get(item.name, "").split()))
        head = f"  {prefix}{item.name}={_spelt(default)}"
        if not whole:
            yield f"{head:42} {textwrap.shorten(_first(text), _WIDTH, placeholder=' ...')}"
            continue
        yield head + (f"   one of {', '.join(words)}" if words else "")
        yield from textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _spelt(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


def _first(text: str) -> str:
    """Return the first sentence of a text."""
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]


def _documents(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    documents = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            documents[field.target.id] = str(below.value.value)  # type: ignore[attr-defined]
    return documents
