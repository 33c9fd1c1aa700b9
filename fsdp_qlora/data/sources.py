"""Rows from local files and the hub through `datasets`, with errors that name the file and the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_HUB_TRAIN = "train"


def names_of(value: str | Iterable[str]) -> list[str]:
    """Return one name or several as a list."""
    return [value] if isinstance(value, str) else list(value)


def load_rows(names: list[str], cache: Path) -> Dataset:
    """Load the rows of files and hub data sets, one after the other.

    Raises:
        DataError: naming the file and the line, if one is missing, empty or malformed.
    """
    from datasets import disable_progress_bars
    from datasets import logging as datasets_logging

    disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # it names no line; our message does
    parts = [_load_file(Path(name), cache) if is_file(name) else _load_hub(name) for name in names]
    return parts[0] if len(parts) == 1 else _concatenate(parts, names)


def is_file(name: str) -> bool:
    """Whether a name means a local file (it is there, or looks like one) and not a hub data set."""
    path = Path(name).expanduser()
    return path.suffix in _BUILDERS or path.exists() or path.is_absolute() or name.startswith((".", "~"))


def fingerprint(names: list[str]) -> list[str]:
    """Return one line per source that changes when its content does."""
    return [_sha256(Path(name).expanduser()) if is_file(name) else f"hub {name}" for name in names]


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"data: there is no file {path}.{_embedded_hint(path)}")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _embedded_hint(path: Path) -> str:
    if "embedded" in path.parts:
        return " The embedded data are fetched by `fsdp-qlora prepare experiment=quickstart` (or `make train`)."
    return ""


def _load_file(path: Path, cache: Path) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"data: there is no file {path}.{_embedded_hint(path)}")
    builder = _BUILDERS.get(path.suffix)
    if builder is None:
        raise DataError(f"data: {path}: unknown kind of file; known are {', '.join(_BUILDERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"data: {path} is empty.")
    if builder == "json":
        _require_text(path)
    try:
        rows = load_dataset(builder, data_files=str(path), split="train", cache_dir=str(cache / "datasets"))
    except (DatasetGenerationError, ValueError, OSError, TypeError) as error:
        raise DataError(_diagnose(path, builder, error)) from error
    assert isinstance(rows, Dataset)
    if rows.num_rows == 0:
        raise DataError(f"data: {path} holds no rows.")
    return rows


def _require_text(path: Path) -> None:
    """Refuse what `datasets` would read wrongly or not at all: the first line must be JSON."""
    with path.open("rb") as stream:
        if b"\0" in stream.read(4096):
            raise DataError(f"data: {path} is not a text file.")


def _diagnose(path: Path, builder: str, error: Exception) -> str:
    """Find the line that `datasets` could not read; it names none."""
    if builder == "json":
        for message in _json_problems(path):
            return message
    cause = error.__cause__ or error
    return f"data: {path} cannot be read: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}"


def _json_problems(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        if path.suffix == ".json" and stream.read(64).lstrip().startswith("["):
            try:
                json.loads(path.read_text(encoding="utf-8", errors="replace"))
            except ValueError as problem:
                yield f"data: {path} is not valid JSON: {problem}"
            return
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            if line.strip() and (problem := _row_problem(line)):
                yield f"data: {path}, line {number}: {problem}"


def _row_problem(line: str) -> str | None:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as problem:
        return f"not valid JSON: {problem.msg} at column {problem.colno}"
    return None if isinstance(value, dict) else f"expected an object {{...}}, got {type(value).__name__}"


def _load_hub(name: str) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, split=_HUB_TRAIN)
    except (DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise DataError(
            f"data: {name} is no file here and the hub did not give its {_HUB_TRAIN!r} split: "
            f"{str(error).splitlines()[0]}"
        ) from error
    assert isinstance(rows, Dataset)
    return rows


def _concatenate(parts: list[Dataset], names: list[str]) -> Dataset:
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"data: {', '.join(names)} have columns of different types and cannot be joined: {error}"
        ) from error
