"""What a section of the page is made of: plain data, which the template escapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST_TEXT = 4000
"""Characters of a text from a run that the page shows."""


@dataclass(frozen=True)
class Note:
    """A sentence."""

    text: str
    warning: bool = False
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Heading:
    """A heading inside a section: a run's name, where there are several."""

    text: str
    kind: str = field(default="heading", init=False)


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether it is shown only when the caption is opened."""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Key:
    """An entry of a picture's legend."""

    label: str
    colour: int
    dashed: bool


@dataclass(frozen=True)
class Picture:
    """A picture with its summary in words and its values in a table."""

    title: str
    summary: str
    svg: str | None
    """From `fsdp_qlora.report.pictures`; None where it cannot be drawn."""
    table: Table
    legend: Sequence[Key] = ()
    kind: str = field(default="picture", init=False)


@dataclass(frozen=True)
class Code:
    """A command to paste."""

    caption: str
    text: str
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Dialogue:
    """A prompt with answers: (who answers, the answer)."""

    prompt: str
    answers: Sequence[tuple[str, str]]
    kind: str = field(default="dialogue", init=False)


@dataclass(frozen=True)
class Sample:
    """A training row: texts and whether each is learned."""

    title: str
    segments: Sequence[tuple[str, bool]]
    kind: str = field(default="sample", init=False)


Block = Note | Heading | Table | Picture | Code | Dialogue | Sample


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its table of contents."""

    key: str
    """The anchor."""
    title: str
    blocks: Sequence[Block]


def cut(text: object) -> str:
    """Return a value of a run as text of a length that a page can show."""
    words = text if isinstance(text, str) else str(text)
    left = len(words) - LONGEST_TEXT
    return words if left <= 0 else f"{words[:LONGEST_TEXT]} ... ({left} more characters)"
