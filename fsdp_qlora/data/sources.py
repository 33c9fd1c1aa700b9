"""The sources that `data.train` accepts: files (local or remote, also compressed), folders, globs, hub data sets."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fsdp_qlora.data.folders import (
    files_of,
    is_data,
    is_inside,
    left_out,
    links_away,
    require_some,
    rows_or_texts,
)
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.readers import COMPRESSED, KINDS, kind_of, read_file
from fsdp_qlora.data.remote import stamp
from fsdp_qlora.data.tables import null_dropper, without_nulls
from fsdp_qlora.errors import DataError, first_line
from fsdp_qlora.files.read import file_sha256
from fsdp_qlora.shown import shown_source, visible

if TYPE_CHECKING:
    from datasets import IterableDataset

_HUB_SPLIT = "train"
_GLOB = "*?["
_MEDIA = {"Image", "Audio", "Video", "Pdf", "Nifti", "Mesh"}
"""Features of `datasets` that need extra libraries to decode."""


def names_of(value: str | Iterable[str]) -> list[str]:
    """Return one or several names as a list."""
    return [value] if isinstance(value, str) else list(value)


def is_file(name: str) -> bool:
    """Whether a name means files (it exists, or looks like a path) rather than a hub data set."""
    path = Path(name).expanduser()
    known = kind_of(name) is not None or any(c in name for c in _GLOB) or "://" in name
    return (
        known or path.exists() or path.is_absolute() or name.startswith((".", "~")) or _folder_split(name) is not None
    )


def _folder_split(name: str) -> tuple[Path, str] | None:
    """Return folder and split of ``folder:split``; None if the name is not of that form."""
    place, colon, split = name.rpartition(":")
    folder = Path(place).expanduser()
    return (folder, split) if colon and split and not Path(name).expanduser().exists() and folder.is_dir() else None


def folders_of_files(name: str) -> list[str]:
    """Return the folder of each file of a source, as its rows have it; empty for what is not on this machine."""
    return [str(Path(file).parent) if "://" not in file and is_file(file) else "" for file in expand(name)]


def expand(name: str) -> list[str]:
    """Return the files for a path, a folder, ``folder:split`` or a glob; hub names and URLs are returned unchanged.

    Raises:
        DataError: if there are none, or one is of an unknown kind.
    """
    if not is_file(name) or "://" in name:
        return [name]
    path = Path(name).expanduser()
    if path.is_dir():
        return [str(file) for file in files_of(path, None, kind_of)]
    if (part := _folder_split(name)) is not None:
        return [str(file) for file in files_of(*part, kind_of)]
    files = _matches(path) if any(c in name for c in _GLOB) and not path.exists() else [str(path)]
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"data: there is no file {file}.{_embedded_hint(Path(file))}")
        if kind_of(file) is None:
            known = f"{', '.join(KINDS)}, also with {', '.join(COMPRESSED)}"
            raise DataError(f"data: {file}: unknown file type; known types are {known}.")
    return files


def not_read(names: Iterable[str]) -> list[str]:
    """Return a line for each folder with files that could be data but that none of ``names`` reads.

    Links that lead out of a folder or a pattern's folder are listed in lines of their own.
    """
    every = list(names)
    local = [name for name in every if "://" not in name and is_file(name)]
    read = {Path(file) for name in local for file in expand(name)}
    skipped: dict[Path, set[Path]] = {}
    for name in local:
        folder, split = _folder_split(name) or (Path(name).expanduser(), None)
        if folder.is_dir():
            skipped.setdefault(folder, set()).update(left_out(folder, split, kind_of))
    lines = []
    for folder, files in skipped.items():
        left = sorted(str(file.relative_to(folder)) for file in files - read)
        if left:
            lines.append(_line(folder, left, "skipped", "text files beside data files, or another split"))
    for name in local:
        if away := sorted(str(file) for file in _links_away(name)):
            lines.append(_line(name, away, "skipped", "links to files outside; name a file itself to use it"))
    return lines


def _line(place: Path | str, files: list[str], what: str, why: str) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    line = f"data: {place}: {what} {', '.join(files[:3])}{more} ({why})"
    return visible(line).replace("\n", "\\n")  # file names are untrusted


def _links_away(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return links_away(path, None, kind_of)
    if (part := _folder_split(name)) is not None:
        return links_away(*part, kind_of)
    if any(c in name for c in _GLOB) and not path.exists():
        return [file for file in _found(path) if not is_inside(file, _fixed(path))]
    return []


def _matches(pattern: Path) -> list[str]:
    """Return the matching files, sorted; a pattern without a known suffix is filtered as a folder is."""
    files = _found(pattern)
    if not files:
        raise DataError(f"data: no file matches {pattern}.")
    return [str(file) for file in require_some(files, _fixed(pattern))]


def _found(pattern: Path) -> list[Path]:
    files = sorted(Path(f) for f in glob.glob(str(pattern), recursive=True) if Path(f).is_file())  # noqa: PTH207 (absolute)
    if kind_of(pattern.name) is None:
        data = (file for file in files if kind_of(file.name) is not None and is_data(file, _fixed(pattern)))
        files = rows_or_texts(data, lambda name: kind_of(name) == "text") or files
    return files


def _fixed(pattern: Path) -> Path:
    """Return the leading folders of a pattern, up to its first wildcard."""
    fixed = Path()
    for part in pattern.parts[:-1]:
        if any(c in part for c in _GLOB):
            break
        fixed /= part
    return fixed


def _embedded_hint(path: Path) -> str:
    if "embedded" in path.parts:
        return " The embedded data are fetched by `fsdp-qlora prepare experiment=quickstart` (or `make train`)."
    return ""


def stated(name: str) -> list[str]:
    """Return a source's files with their sizes, or remote `fingerprint`; identifies a stream without reading it.

    Raises:
        DataError: if the source does not exist.
    """
    return [
        f"{file} {Path(file).stat().st_size}" if "://" not in file and is_file(file) else fingerprint(file)
        for file in expand(name)
    ]


def fingerprint(name: str) -> str:
    """Return a text that changes with the content of a source, as far as a server reports it; for the hub, its name.

    Raises:
        DataError: if the source does not exist.
    """
    lines = []
    for file in expand(name):
        if not is_file(file):
            lines.append(f"hub {file}")
        elif "://" in file:
            lines.append(f"{kind_of(file)} {shown_source(file)} {stamp(file)}")
        else:
            # The kind is included because the same bytes mean something else in another kind of file.
            lines.append(f"{kind_of(file)} {file_sha256(Path(file))}")
    return "\n".join(lines)


def read_source(name: str) -> Iterator[Row]:
    """Yield the rows of a file, folder, glob, URL or hub data set; a bad row is yielded with its problem.

    Raises:
        DataError: if the source is missing, empty or unreadable.
    """
    for file in expand(name):
        if not is_file(file):
            yield from _hub(file)
            continue
        number, folder = 0, "" if "://" in file else str(Path(file).parent)
        for row in read_file(file):
            number += 1
            yield replace(row, folder=folder)
        if number == 0:
            raise DataError(f"data: {shown_source(file)} is empty.")


def hub_parts(name: str) -> tuple[str, str | None, str]:
    """Return repository, configuration and split of ``owner/name[/config][:split]``."""
    place, _, split = name.partition(":")
    owner, name, config = (*place.split("/", 2), "", "")[:3]
    return "/".join(part for part in (owner, name) if part), config or None, split or _HUB_SPLIT


def hub_refusal(name: str, error: Exception) -> DataError:
    """Return the error for a hub data set that cannot be loaded."""
    repo, config, split = hub_parts(name)
    which = f"{repo}, configuration {config}," if config else repo
    text = " ".join(str(error).split())
    if config is None and re.search(
        r"config(?:uration)? name is missing|pick one among the available configs", text, re.I
    ):
        return DataError(
            f"data: {repo} has several configurations; name one of them: {repo}/CONFIG, or "
            f"{repo}/CONFIG:{split} for a split. {text}"
        )
    return DataError(
        f"data: {which} is not a local file, and the hub did not provide its {split!r} split: {first_line(error)}"
    )


def _hub(name: str) -> Iterator[Row]:
    from datasets import load_dataset

    repo, config, split = hub_parts(name)
    try:
        yield from streamed_rows(load_dataset(repo, config, split=split, streaming=True), name)
    except Exception as error:  # `datasets`, the hub's client and each format have their own exceptions
        raise hub_refusal(name, error) from error


def streamed_rows(rows: IterableDataset, name: str) -> Iterator[Row]:
    """Yield the rows of a `datasets` stream, without images, audio, video and other media."""
    media = {column: kind for column, kind in (rows.features or {}).items() if type(kind).__name__ in _MEDIA}
    for column, kind in media.items():
        rows = rows.cast_column(column, replace(kind, decode=False)).remove_columns(column)
    kinds = rows.features.arrow_schema if rows.features is not None else []
    drop = {field.name: null_dropper(field.type, decode=False) or _unchanged for field in kinds}
    for number, values in enumerate(cast(Iterable[dict[str, Any]], rows), start=1):
        clean = {key: drop.get(key, without_nulls)(value) for key, value in values.items() if value is not None}
        yield Row(f"{name}, row {number}", dict.fromkeys(values) | clean)


def _unchanged(value: Any) -> Any:
    return value
