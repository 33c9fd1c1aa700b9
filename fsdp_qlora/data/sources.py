"""Rows from files (local or remote, compressed or not), folders, globs and the hub, each with the place it came from.

Text files are read line by line here and not by `datasets`, whose readers infer one schema for a whole file and name no
line: a row of another shape must not fail its neighbours, and a bad one must be found.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsdp_qlora.errors import DataError

_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_HUB_SPLIT = "train"
_GLOB = "*?["


@dataclass(frozen=True)
class Row:
    """One row, or why there is none."""

    where: str
    """File and line, or file and row number."""
    values: dict[str, Any] | None
    problem: str = ""
    """What is wrong with it, where ``values`` is None."""


def names_of(value: str | Iterable[str]) -> list[str]:
    """Return one name or several as a list."""
    return [value] if isinstance(value, str) else list(value)


def is_file(name: str) -> bool:
    """Whether a name means files (it is there, or looks like them) and not a hub data set."""
    path = Path(name).expanduser()
    known = _kind(name) is not None or any(c in name for c in _GLOB) or "://" in name
    return known or path.exists() or path.is_absolute() or name.startswith((".", "~"))


def _kind(name: str) -> str | None:
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return _KINDS.get(suffix)


def expand(name: str) -> list[str]:
    """Return the files that a file's name, a folder or a glob means, sorted; a hub name or a URL as it is.

    Raises:
        DataError: if there are none, or one is of an unknown kind.
    """
    if not is_file(name) or "://" in name:
        return [name]
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(str(f) for f in path.rglob("*") if f.is_file() and _kind(f.name) is not None)
        if not files:
            raise DataError(f"data: the folder {path} holds no file of a known kind ({', '.join(_KINDS)}).")
        return files
    if any(c in name for c in _GLOB) and not path.exists():
        files = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())  # noqa: PTH207 (absolute)
        if not files:
            raise DataError(f"data: no file matches {path}.")
    else:
        files = [str(path)]
    for file in files:
        if not Path(file).is_file():
            raise DataError(f"data: there is no file {file}.{_embedded_hint(Path(file))}")
        if _kind(file) is None:
            known = f"{', '.join(_KINDS)}, also with {', '.join(_COMPRESSED)}"
            raise DataError(f"data: {file}: unknown kind of file; known are {known}.")
    return files


def _embedded_hint(path: Path) -> str:
    if "embedded" in path.parts:
        return " The embedded data are fetched by `fsdp-qlora prepare experiment=quickstart` (or `make train`)."
    return ""


def stated(name: str) -> list[str]:
    """Return a source's files with their sizes: what tells streams apart without reading them.

    Raises:
        DataError: if it is not there.
    """
    local = [file for file in expand(name) if is_file(file) and "://" not in file]
    return [f"{file} {Path(file).stat().st_size}" for file in local] or [name]


def fingerprint(name: str) -> str:
    """Return a line that changes when the content of a source does (as far as a remote one tells).

    Raises:
        DataError: if it is not there.
    """
    lines = []
    for file in expand(name):
        if not is_file(file):
            lines.append(f"hub {file}")
        elif "://" in file:
            import fsspec

            fs, path = fsspec.url_to_fs(file)
            lines.append(f"{file} {fs.ukey(path)}")
        else:
            with Path(file).open("rb") as stream:
                lines.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return "\n".join(lines)


def read_source(name: str) -> Iterator[Row]:
    """Yield the rows of a file, folder, glob, URL or hub data set, one after the other.

    Raises:
        DataError: if it is missing, empty or cannot be read at all. A single bad row is yielded with its problem.
    """
    for file in expand(name):
        if not is_file(file):
            yield from _hub(file)
            continue
        number = 0
        try:
            for row in _file(file):
                number += 1
                yield row
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"data: {file} cannot be read: {type(error).__name__}: {_first_line(error)}") from error
        if number == 0:
            raise DataError(f"data: {file} is empty.")


def _file(name: str) -> Iterator[Row]:
    import fsspec

    kind = _kind(name)
    if kind is None:
        raise DataError(f"data: {name}: unknown kind of file; known are {', '.join(_KINDS)}.")
    with cast(Any, fsspec.open(name, "rb", compression="infer")) as opened:
        stream = io.BufferedReader(opened) if name.endswith(".zst") else opened  # zstd's own has no lines
        if kind in ("parquet", "arrow"):
            yield from _table(name, kind, stream)
        elif kind == "csv":
            yield from _csv(name, stream)
        elif kind == "text":
            for row in _lines(name, stream):
                yield row if row.values is None else Row(row.where, {"text": row.values["line"]})
        else:
            yield from _json(name, kind, stream)


def _lines(name: str, stream: Any) -> Iterator[Row]:
    """Yield lines that are not blank as ``{"line": text}``; what is not UTF-8 as a problem."""
    for number, line in enumerate(stream, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Row(where, None, f"not valid UTF-8 at byte {error.start + 1} of the line")
            continue
        if "\0" in text:
            yield Row(where, None, "holds a NUL character")
        elif text.strip():
            yield Row(where, {"line": text})


def _json(name: str, kind: str, stream: Any) -> Iterator[Row]:
    if kind == "json":
        data = stream.read()
        if data.lstrip()[:1] == b"[":
            yield from _json_array(name, data)
            return
        stream = io.BytesIO(data)
    for row in _lines(name, stream):
        if row.values is None:
            yield row
            continue
        try:
            yield _object(row.where, _parse(row.values["line"]))
        except _DuplicateKeyError as error:
            yield Row(row.where, None, str(error))
        except json.JSONDecodeError as error:
            yield Row(row.where, None, f"not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            yield Row(row.where, None, "not valid JSON: nested too deeply")


def _json_array(name: str, data: bytes) -> Iterator[Row]:
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {name} is not valid JSON: {_first_line(error)}") from error
    for number, value in enumerate(values, start=1):
        yield _object(f"{name}, row {number}", value)


def _object(where: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, None, f"expected an object {{...}}, got {type(value).__name__}")


class _DuplicateKeyError(ValueError):
    pass


def _parse(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, _ in pairs if sum(1 for other, _ in pairs if other == key) > 1)
            raise _DuplicateKeyError(f"the key {twice!r} comes twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _csv(name: str, stream: Any) -> Iterator[Row]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter="\t" if Path(name).stem.endswith(".tsv") or ".tsv" in name else ",")
    try:
        for values in reader:
            where = f"{name}, line {reader.line_num}"
            if None in values or None in values.values():
                yield Row(where, None, f"does not have the {len(reader.fieldnames or [])} columns of the first line")
            else:
                yield Row(where, dict(values))
    except csv.Error as error:
        raise DataError(f"data: {name}, line {reader.line_num}: {error}") from error


def _table(name: str, kind: str, stream: Any) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            batches = pq.ParquetFile(stream).iter_batches(batch_size=1024)
        else:
            data = pa.BufferReader(stream.read())
            try:
                batches = iter(pa.ipc.open_stream(data))
            except pa.ArrowInvalid:
                data.seek(0)
                file = pa.ipc.open_file(data)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
        number = 0
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{name}, row {number}", values)
    except pa.ArrowException as error:
        raise DataError(f"data: {name} cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _hub(name: str) -> Iterator[Row]:
    """Yield the rows of ``owner/name`` or ``owner/name:split``, streamed from the hub."""
    from datasets import load_dataset

    repo, _, split = name.partition(":")
    try:
        rows = load_dataset(repo, split=split or _HUB_SPLIT, streaming=True)
        for number, values in enumerate(cast(Iterable[dict[str, Any]], rows), start=1):
            yield Row(f"{name}, row {number}", dict(values))
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"data: {repo} is no file here and the hub did not give its {split or _HUB_SPLIT!r} split: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
