"""Which files of a folder are data.

A folder is often a clone or a download. Besides rows it contains a card, a licence, requirements, hidden copies, and
files left by `datasets`, Spark or the operating system; none of these are data. A folder saved by `datasets` and a
repository with a card list their own data files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora.data.card import files_of_card
from fsdp_qlora.errors import DataError

_PLACES = {"node_modules", "site-packages", "_temporary", "_delta_log"}
"""Folders whose files are never data, besides those that start with a dot or two underscores."""
_PLACE_ENDINGS = (".incomplete", ".egg-info", ".dist-info")
_RECORDS = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json",
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "preprocessor_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "adapter_config.json", "trainer_state.json", "package.json", "package-lock.json", "tsconfig.json", "composer.json",
    "cmakelists.txt", "robots.txt", "thumbs.db", "desktop.ini", "sources.txt", "top_level.txt", "dependency_links.txt",
}  # fmt: skip
"""Metadata of data sets, models and packages, in lower case."""
_ABOUT = re.compile(
    r"read[-_ ]?me(?:[-_.]\w{2,8})?"
    r"|(?:un)?licen[cs]es?(?:[-_.](?:mit|apache|bsd|[al]?gpl|mpl|cc|isc|code|data|third).*)?"
    r"|copying|copyright|notices?|authors|contributors|contributing|maintainers|change[-_ ]?log|release[-_ ]?notes"
    r"|code[-_ ]of[-_ ]conduct|security|citation|terms[-_ ]of[-_ ](?:use|service)|(?:data|model|dataset)[-_ ]?card"
    r"|data[-_ ]?sheet|(?:(?:dev|test|docs|build|gpu|cpu)[-_.])?requirements(?:[-_.][\w-]+)?|constraints"
    r"|(?:sha\d+|md5|check)[-_]?sums?",
    re.IGNORECASE,
)
"""Names, without suffix, of documents about a data set or program: ``README``, ``LICENSE-MIT``, ``README.de``."""
_TEXT = (".md", ".txt")
_CACHED = re.compile(r"(?:cache-[0-9a-f]{6,}.*|tmp[a-z0-9_]{8}.*)\.arrow")
"""Caches of ``Dataset.map``, written next to the file that it reads."""
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Word in a file name -> split, as in `datasets`."""


def is_data(path: Path, root: Path) -> bool:
    """Whether a file below ``root`` may be data, judging by its name and folders."""
    *folders, name = path.relative_to(root).parts
    if any(_is_no_place(folder) for folder in folders) or name.startswith((".", "__", "~$")):
        return False
    lower = name.lower()
    if lower in _RECORDS or _CACHED.fullmatch(lower):
        return False
    about = lower.endswith(_TEXT) and _ABOUT.fullmatch(lower[: lower.rfind(".")])
    return not about


def _is_no_place(folder: str) -> bool:
    return folder.startswith((".", "__")) or folder.lower() in _PLACES or folder.endswith(_PLACE_ENDINGS)


def rows_or_texts(files: Iterable[Path], is_text: Callable[[str], bool]) -> list[Path]:
    """Return the row files or, if there are none, the text files. The two are never mixed."""
    every = list(files)
    return [file for file in every if not is_text(file.name)] or every


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file really lies in a folder, rather than being a link that leads out of it.

    The author of the folder may have planted such a link. A snapshot in the hub's cache may link to its own blobs.
    """
    root = folder.resolve()
    for parent in (root, *root.parents):
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            root = parent.parent
    return file.resolve().is_relative_to(root)


def links_away(folder: Path, split: str | None, kind: Callable[[str], str | None]) -> list[Path]:
    """Return the files of a folder that would be data but are links to files outside it."""
    return [file for file in _files_of(folder, split, kind) if not is_inside(file, folder)]


def require_some(files: list[Path], folder: Path) -> list[Path]:
    """Return the files that are really inside a folder.

    Raises:
        DataError: if there are none.
    """
    inside = [file for file in files if is_inside(file, folder)]
    if not inside:
        raise DataError(
            f"data: {folder} holds only links to files outside it ({files[0].name}), which are not followed; name "
            "those files themselves."
        )
    return inside


def files_of(folder: Path, split: str | None, kind: Callable[[str], str | None]) -> list[Path]:
    """Return the data files of a folder, without links that lead out of it.

    Args:
        folder: any folder, including one saved by `datasets`.
        split: the split to take; None takes ``train`` if the file names distinguish splits, else everything.
        kind: maps a file name to the kind of file, or None if it is unknown.

    Raises:
        DataError: if there are no data files, or the split does not exist.
    """
    return require_some(_files_of(folder, split, kind), folder)


def _files_of(folder: Path, split: str | None, kind: Callable[[str], str | None]) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        return _of_saved_splits(folder, split or "train")
    if split is None and (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return list(_saved(folder))
    if (listed := files_of_card(folder, split, kind)) is not None:
        return listed
    files = rows_or_texts(_below(folder, kind), lambda name: kind(name) == "text")
    if not files:
        raise DataError(f"data: the folder {folder} holds no data: no JSONL, JSON, CSV, Parquet, Arrow or text file.")
    return _of_split(folder, files, split)


def left_out(folder: Path, split: str | None, kind: Callable[[str], str | None]) -> list[Path]:
    """Return files that could be data but are skipped: text in a folder with rows, and other splits."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return []
    read = set(_files_of(folder, split, kind))
    return [path for path in _below(folder, kind) if path not in read and is_inside(path, folder)]


def _below(folder: Path, kind: Callable[[str], str | None]) -> list[Path]:
    paths = (path for path in folder.rglob("*") if kind(path.name) is not None and is_data(path, folder))
    return sorted(path for path in paths if path.is_file())


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of a split; with None, all except held-out splits if there is a training split."""
    parts: dict[str | None, list[Path]] = {}
    for file in files:
        parts.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if split is None:
        held_out = {"validation", "test"} if "train" in parts else set()
        return [file for file in files if _split_of(file.relative_to(folder)) not in held_out]
    chosen = parts.get(_SPLITS.get(split, split))
    if not chosen:
        raise DataError(
            f"data: the folder {folder} has no split {split!r}; the splits found are: "
            f"{', '.join(sorted(name for name in parts if name)) or 'none'}."
        )
    return chosen


def _split_of(path: Path) -> str | None:
    """Return the split named by the file name, else by the innermost folder that names one."""
    for part in (path.name, *reversed(path.parts[:-1])):
        said = {_SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLITS}
        if len(said) == 1:
            return said.pop()
    return None


def _of_saved_splits(folder: Path, split: str) -> list[Path]:
    """Return the files of one split of a folder written by ``DatasetDict.save_to_disk``."""
    splits = _read(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or split not in splits:
        names = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
        raise DataError(
            f"data: the folder {folder} was saved by `datasets` with the splits {names}; {split!r} is not one of them. "
            f"Select one with {folder}:SPLIT."
        )
    return list(_saved(folder / split))


def _saved(folder: Path) -> Iterator[Path]:
    """Yield the files that ``Dataset.save_to_disk`` has listed, in that order."""
    state = folder / "state.json"
    files = _read(state).get("_data_files")
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names:
        raise DataError(f"data: {state} names no data file; did `datasets` finish saving the folder?")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"data: {state} names {name!r}, which is not a file in that folder.")
        if not (folder / name).is_file():
            raise DataError(f"data: {folder / name} is missing, although {state} names it.")
        yield folder / name


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data: {file} cannot be read: {type(error).__name__}: {error}") from error
    return value if isinstance(value, dict) else {}
