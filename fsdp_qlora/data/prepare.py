"""Tokenize once, keep as Arrow, memory-map everywhere.

One process per node prepares; the others wait for the folder to appear. No collective
waits meanwhile, so no timeout can end a long preparation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example, encode, find_format, read_row
from fsdp_qlora.data.sources import fingerprint, load_rows, names_of
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 1  # of what is written; a change makes old caches unused


@dataclass(frozen=True)
class DataRequest:
    """What to prepare; every field is part of the cache's key."""

    train: tuple[str, ...]
    eval: tuple[str, ...]
    eval_fraction: float
    row_format: str
    max_length: int
    truncation: str
    max_rows: int | None
    seed: int


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one part."""

    rows: int = 0
    """Rows read."""
    kept: int = 0
    """Sequences to learn from."""
    truncated: int = 0
    dropped_long: int = 0
    dropped_unsupervised: int = 0
    tokens: int = 0
    target_tokens: int = 0


@dataclass(frozen=True)
class PreparedData:
    """Tokenized rows (columns ``input_ids`` int32 and ``learned`` bool), memory-mapped."""

    train: Dataset
    eval: Dataset | None
    train_counts: Counts
    eval_counts: Counts
    key: str
    """Changes when the sources, the tokenizer, the template or a setting does."""


def prepare_data(request: DataRequest, tokenizer: PreTrainedTokenizerBase, cache: Path, prepares: bool) -> PreparedData:
    """Return the tokenized data; the process with ``prepares`` makes them if the cache has none.

    Raises:
        DataError: if a source is missing or malformed, or nothing in it is supervised.
    """
    from datasets import Dataset, load_from_disk  # here, so that what needs no data does not need `datasets`

    key = _key(request, tokenizer)
    folder = cache / "tokens" / key
    if prepares and not (folder / "counts.json").is_file():
        _prepare(request, tokenizer, cache, folder)
    while not (folder / "counts.json").is_file():
        time.sleep(0.2)  # the watch thread ends this process if the one that prepares has failed
    counts = json.loads((folder / "counts.json").read_text())
    has_eval = (folder / "eval").is_dir()
    train = load_from_disk(str(folder / "train"))
    held_out = load_from_disk(str(folder / "eval")) if has_eval else None
    assert isinstance(train, Dataset)
    assert held_out is None or isinstance(held_out, Dataset)
    return PreparedData(train, held_out, Counts(**counts["train"]), Counts(**counts["eval"]), key)


def _key(request: DataRequest, tokenizer: PreTrainedTokenizerBase) -> str:
    sources = fingerprint([*request.train, *request.eval])
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    settings = {key: value for key, value in asdict(request).items() if key not in ("train", "eval")}
    parts = [
        _VERSION,
        settings,
        len(request.train),
        sources,
        vocabulary,
        str(tokenizer.chat_template),
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _prepare(request: DataRequest, tokenizer: PreTrainedTokenizerBase, cache: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = load_rows(list(request.train), cache)
    if request.max_rows:
        rows = rows.select(range(min(request.max_rows, rows.num_rows)))
    parts = {"train": rows, "eval": load_rows(list(request.eval), cache)} if request.eval else _split(rows, request)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    counts: dict[str, Any] = {"train": asdict(Counts()), "eval": asdict(Counts())}
    try:
        for name, part in parts.items():
            data, tally = _tokenize(part, request, tokenizer)
            data.save_to_disk(str(staging / name))
            counts[name] = asdict(tally)
        (staging / "counts.json").write_text(json.dumps(counts))
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    try:
        os.rename(staging, folder)  # noqa: PTH104  (atomic; Path.rename would hide which of two runs came first)
    except OSError:
        if not (folder / "counts.json").is_file():  # else another run has just prepared the same
            raise


def _split(rows: Dataset, request: DataRequest) -> dict[str, Dataset]:
    """Hold out ``eval_fraction`` of the distinct prompts, chosen by a hash of (seed, prompt)."""
    if request.eval_fraction == 0:
        return {"train": rows}
    row_format = _format_of(rows, request)
    keys = [_example(row, row_format, number).prompt_key for number, row in enumerate(_dicts(rows), start=1)]
    distinct = sorted(set(keys), key=lambda k: hashlib.sha256(f"{request.seed}\0{k}".encode()).digest())
    held_out = set(distinct[: max(1, round(request.eval_fraction * len(distinct)))])
    if len(held_out) == len(distinct):
        raise DataError(f"data.eval_fraction: with {len(distinct)} distinct prompt(s) nothing is left to train on.")
    parts = {"train": [], "eval": []}
    for number, key in enumerate(keys):
        parts["eval" if key in held_out else "train"].append(number)
    return {name: rows.select(numbers) for name, numbers in parts.items()}


def _format_of(rows: Dataset, request: DataRequest) -> str:
    return find_format(rows.column_names) if request.row_format == "auto" else request.row_format


def _dicts(rows: Dataset) -> Any:
    return iter(rows)


def _example(row: Mapping[str, Any], row_format: str, number: int) -> Example:
    try:
        return read_row(row, row_format)
    except DataError as error:
        raise DataError(f"data: row {number}: {error}") from error


def _tokenize(rows: Dataset, request: DataRequest, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Counts]:
    from datasets import Dataset, Features, List, Value

    row_format = _format_of(rows, request)
    tally = asdict(Counts())

    def generate() -> Any:
        for number, row in enumerate(_dicts(rows), start=1):
            example = _example(row, row_format, number)
            try:
                ids, learned = encode(example, tokenizer)
            except DataError as error:
                raise DataError(f"data: row {number}: {error}") from error
            tally["rows"] += 1
            for piece in _fit(ids, learned, request, tally):
                targets = sum(piece[1][1:])  # the first token of a sequence is predicted by nothing
                if targets == 0:
                    tally["dropped_unsupervised"] += 1
                    continue
                tally["kept"] += 1
                tally["tokens"] += len(piece[0])
                tally["target_tokens"] += targets
                yield {"input_ids": piece[0], "learned": piece[1]}

    sequences = list(generate())
    counts = Counts(**tally)
    if counts.kept == 0:
        raise DataError(
            f"data: none of the {counts.rows} rows has a supervised token to learn from "
            f"({counts.dropped_unsupervised} without an answer within data.max_length={request.max_length}, "
            f"{counts.dropped_long} dropped as too long)."
        )
    features = Features({"input_ids": List(Value("int32")), "learned": List(Value("bool"))})
    return Dataset.from_list(sequences, features=features), counts


def _fit(
    ids: list[int], learned: list[bool], request: DataRequest, tally: dict[str, int]
) -> list[tuple[list[int], list[bool]]]:
    """Apply the truncation policy to one row."""
    length = request.max_length
    if len(ids) <= length:
        return [(ids, learned)]
    if request.truncation == "drop":
        tally["dropped_long"] += 1
        return []
    tally["truncated"] += 1
    if request.truncation == "left":
        return [(ids[-length:], learned[-length:])]
    if request.truncation == "right":
        return [(ids[:length], learned[:length])]
    return [(ids[i : i + length], learned[i : i + length]) for i in range(0, len(ids), length)]


def request_of(train: Any, held_out: Any, **settings: Any) -> DataRequest:
    """Build a `DataRequest` from one name or several for each part."""
    if train is None:
        raise DataError("data.train: not set. Give a JSONL, JSON or Parquet file, a hub data set, or a list of them.")
    return DataRequest(tuple(names_of(train)), tuple(names_of(held_out or [])), **settings)
