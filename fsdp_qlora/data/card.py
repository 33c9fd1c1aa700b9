"""Data set cards: a repository's README.md can list the files of each configuration and split."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fsdp_qlora.errors import DataError

_LARGEST = 1 << 20  # characters of a card that are read
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def files_of_card(folder: Path, split: str | None, kind: Callable[[str], str | None]) -> list[Path] | None:
    """Return the files that a repository's card lists for a split; None if there is no card or it lists no files.

    Args:
        folder: the repository.
        split: the split; None means ``train``, or the only split.
        kind: maps a file name to the kind of file, or None if it is unknown.

    Raises:
        DataError: if the card lists several configurations and no default, or does not list the split, or the listed
            files do not exist.
    """
    configs = [entry for entry in _configs(folder / "README.md") if entry.get("data_files")]
    if not configs:
        return None
    default = [entry for entry in configs if entry.get("default") is True or entry.get("config_name") == "default"]
    if len(configs) > 1 and len(default) != 1:
        names = ", ".join(str(entry.get("config_name")) for entry in configs)
        raise DataError(
            f"data: {folder / 'README.md'} lists several configurations: {names}. Name the files of one, for example "
            f"{folder / _patterns(configs[0]).popitem()[1][0]}"
        )
    splits = _patterns((default or configs)[0])
    wanted = split or ("train" if len(splits) > 1 else next(iter(splits), "train"))
    if wanted not in splits:
        raise DataError(
            f"data: {folder / 'README.md'} lists the splits {', '.join(splits)}; {wanted!r} is not one of them. "
            f"Select one with {folder}:SPLIT."
        )
    matches = {path for pattern in splits[wanted] for path in _matching(folder, pattern)}
    files = sorted(path for path in matches if path.is_file() and kind(path.name) is not None)
    if not files:
        raise DataError(
            f"data: {folder / 'README.md'} lists {', '.join(splits[wanted])} for the split {wanted!r}, but there is no "
            "such data file."
        )
    return files


def _configs(card: Path) -> list[dict[str, Any]]:
    try:
        with card.open(encoding="utf-8") as stream:
            front = _FRONT_MATTER.match(stream.read(_LARGEST))
        values = yaml.safe_load(front.group(1)) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return []  # no card, or an unreadable one
    configs = values.get("configs") if isinstance(values, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _patterns(config: dict[str, Any]) -> dict[str, list[str]]:
    """Return the file patterns of each split, relative to the repository's folder."""
    listed = config["data_files"]
    if isinstance(listed, dict):
        pairs = list(listed.items())
    elif isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed):
        pairs = [(entry.get("split", "train"), entry.get("path")) for entry in listed]
    else:
        pairs = [("train", listed)]
    place = f"{config['data_dir']}/" if config.get("data_dir") else ""
    splits: dict[str, list[str]] = {}
    for split, patterns in pairs:
        every = patterns if isinstance(patterns, list) else [patterns]
        splits.setdefault(str(split), []).extend(f"{place}{pattern}" for pattern in every if pattern)
    return {split: patterns for split, patterns in splits.items() if patterns}


def _matching(folder: Path, pattern: str) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        return []  # files elsewhere do not belong to the repository
    return list(folder.glob(pattern))
