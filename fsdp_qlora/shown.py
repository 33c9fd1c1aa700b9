"""Removes secrets in URLs and terminal control characters from text before it is shown or written. Imports no torch.

A URL's query can grant access to the data (presigned URLs), and its user part can contain a password. Others read what
a run writes (settings, summary, the adapter's README, trackers), so neither is written anywhere.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_SOURCES = ("train", "eval")
"""Keys of ``data`` that name data sources."""


def shown_source(source: str) -> str:
    """Return a data source for display: a URL without user, password, query and fragment, anything else unchanged."""
    if "://" not in source:
        return source
    try:
        parts = urlsplit(source)
    except ValueError:
        return source.partition("://")[0] + "://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def has_password(source: str) -> bool:
    """Whether a URL contains a password."""
    try:
        return "://" in source and bool(urlsplit(source).password)
    except ValueError:
        return False


def published(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings (nested dictionaries) in the form in which others may read them."""
    data = {key: _shown(value) if key in _SOURCES else value for key, value in settings["data"].items()}
    return {**settings, "data": data}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown_source(value)
    return [shown_source(item) for item in value] if isinstance(value, list | tuple) else value


_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return ``text`` with control characters escaped, which a terminal would obey.

    Lone surrogates and characters that change the writing direction are escaped as well. Line feeds and tabs stay.
    """
    return _UNSHOWABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
