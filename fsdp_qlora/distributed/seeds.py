"""Seeds that depend on what is drawn, never on which rank draws it."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
