"""Shapes of popular models, for planning without the hub: ``configs/*.json`` are their config.json files."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

SHAPES = Path(__file__).resolve().parent / "configs"


def known_models() -> dict[str, str]:
    """Return hub name -> name of the shape."""
    return json.loads((SHAPES / "names.json").read_text())


def known_config(name: str) -> Path | None:
    """Return the config.json of the hub model ``name``, or None."""
    shape = {hub.lower(): shape for hub, shape in known_models().items()}.get(name.lower())
    return None if shape is None else SHAPES / f"{shape}.json"


def closest(name: str, count: int = 3) -> list[str]:
    """Return the known models whose names are closest to ``name``."""
    names = {hub.lower(): hub for hub in known_models()}
    return [names[hub] for hub in get_close_matches(name.lower(), names, n=count, cutoff=0.4)]
