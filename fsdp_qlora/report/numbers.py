"""How the page spells numbers, whatever a run's files hold in their place."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fsdp_qlora.report.blocks import cut
from fsdp_qlora.report.metrics import number
from fsdp_qlora.track.console import clock, megabytes

NOT_KNOWN = "not recorded"


def bytes_of(values: dict[str, Any], key: str) -> str:
    """Return a number of bytes."""
    count = number(values, key)
    return NOT_KNOWN if count is None else megabytes(count)


def count_of(values: dict[str, Any], key: str) -> str:
    """Return a whole number with separators."""
    count = number(values, key)
    return NOT_KNOWN if count is None else f"{count:,.0f}"


def figure(value: float) -> str:
    """Return a number with four or five digits."""
    return f"{value:.4f}" if 0.1 <= abs(value) < 100 else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def figure_of(values: dict[str, Any], key: str) -> str:
    """Return a number of a file with four or five digits."""
    value = number(values, key)
    return NOT_KNOWN if value is None else figure(value)


def duration_of(seconds: float | None) -> str:
    """Return a duration as seconds, m:ss or h:mm:ss."""
    if seconds is None:
        return NOT_KNOWN
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    hours, rest = divmod(max(0, int(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} h" if hours else f"{clock(rest)} min"


def moment(seconds: float | None) -> str:
    """Return a time as a date in UTC."""
    try:
        return NOT_KNOWN if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return NOT_KNOWN


def rows_of(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return a JSON value of any form as rows of a two-column table."""
    if isinstance(values, dict):
        return [row for key, value in values.items() for row in rows_of(value, f"{prefix} {key}".strip())]
    if isinstance(values, list) and any(isinstance(value, dict | list) for value in values):
        return [row for at, value in enumerate(values, 1) for row in rows_of(value, f"{prefix} {at}".strip())]
    if isinstance(values, list):
        return [(words(prefix), cut(", ".join(map(str, values))))]
    return [(words(prefix), _spelt(values))]


def _spelt(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return figure(value) if isinstance(value, float) else cut(value)


def words(key: str) -> str:
    """Return a key of a JSON file as words."""
    return cut(key.replace("_", " "))
