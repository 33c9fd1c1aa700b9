"""The one place that interprets words in settings: ``auto``, the values of a switch, and where to resume from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

Auto = Literal["auto"]
Switch = Literal["auto", "true", "false"]
"""``auto``: the plan decides and reports its choice."""
N = TypeVar("N", int, float)


def asked(value: str) -> str | None:
    """Return the requested value, or None for ``auto``."""
    return None if value == "auto" else value


def switch(value: str) -> bool | None:
    """Return a `Switch` as a bool, or None for ``auto``."""
    return {"true": True, "false": False, "auto": None}[value]


def degree(value: int | str) -> int | None:
    """Return a number of ranks as asked for, or None for ``auto``."""
    return value if isinstance(value, int) else None


def number(value: N | str) -> N | None:
    """Return a number as asked for, or None for ``auto``."""
    return None if isinstance(value, str) else value


def as_word(value: bool) -> str:
    """Return the `Switch` value for a bool."""
    return "true" if value else "false"


@dataclass(frozen=True)
class Choice:
    """The value chosen for a setting left at ``auto``, and the reason."""

    value: str
    why: str

    def __str__(self) -> str:
        """Return the text shown on the screen and in summary.json."""
        return f"{self.value} ({self.why})" if self.why else self.value


@dataclass(frozen=True)
class Resume:
    """Where a run resumes from (``checkpoint.resume``)."""

    newest: bool
    """Resume from the run's newest valid checkpoint, if there is one (``auto``)."""
    folder: Path | None
    """Resume from this checkpoint."""

    @classmethod
    def of(cls, value: str) -> Resume:
        """Parse ``auto``, ``never`` or a checkpoint path."""
        if value in ("auto", "never"):
            return cls(value == "auto", None)
        return cls(False, Path(value).expanduser())

    @property
    def never(self) -> bool:
        """Whether the run starts afresh."""
        return not self.newest and self.folder is None
