"""What words in settings stand for, decided here and nowhere else: ``auto``, a switch's, where a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def asked(value: str) -> str | None:
    """Return what was asked for; None where the choice is ours (``auto``)."""
    return None if value == "auto" else value


def switch(value: str) -> bool | None:
    """Return a `Switch` as what it means; None where the choice is ours."""
    return {"true": True, "false": False, "auto": None}[value]


def as_word(value: bool) -> str:
    """Return a switch's word."""
    return "true" if value else "false"


@dataclass(frozen=True)
class Choice:
    """What was chosen of a setting that was ours to choose, and why."""

    value: str
    why: str

    def __str__(self) -> str:
        """Return it as it is printed and as summary.json has it."""
        return f"{self.value} ({self.why})" if self.why else self.value


@dataclass(frozen=True)
class Resume:
    """Where a run goes on from (``checkpoint.resume``)."""

    newest: bool
    """From its newest valid checkpoint, if it has one (``auto``)."""
    folder: Path | None
    """From this checkpoint."""

    @classmethod
    def of(cls, value: str) -> Resume:
        """Return what ``auto``, ``never`` or a path stands for."""
        if value in ("auto", "never"):
            return cls(value == "auto", None)
        return cls(False, Path(value).expanduser())

    @property
    def never(self) -> bool:
        """Whether the run starts anew."""
        return not self.newest and self.folder is None
