"""Names as they may be shown and kept: without the secrets that a URL can hold. Imports no torch.

A URL's query can be a key to the data (presigned URLs), its user part a password. What a run writes (settings, summary,
the adapter's README, trackers) is read by others, so neither is written anywhere.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

_SOURCES = ("train", "eval")
"""Keys of ``data`` that name sources."""


def shown_source(source: str) -> str:
    """Return the name of a source of data: a URL without user, password, query and fragment, all else as it is."""
    if "://" not in source:
        return source
    try:
        parts = urlsplit(source)
    except ValueError:
        return source.partition("://")[0] + "://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def has_password(source: str) -> bool:
    """Whether a URL has a password in it."""
    try:
        return "://" in source and bool(urlsplit(source).password)
    except ValueError:
        return False


def published(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings, nested dictionaries, as they may be written for others to read."""
    data = {key: _shown(value) if key in _SOURCES else value for key, value in settings["data"].items()}
    return {**settings, "data": data}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown_source(value)
    return [shown_source(item) for item in value] if isinstance(value, list | tuple) else value
