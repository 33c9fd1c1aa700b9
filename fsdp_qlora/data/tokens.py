"""Rows -> an Arrow file of token ids, with counts of what happened to the rows and a list of bad ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example, read_row
from fsdp_qlora.data.encode import Encoded, StuckTemplateError, TrainOn, encode_batch
from fsdp_qlora.data.lines import Row
from fsdp_qlora.errors import DataError

_BATCH, _BATCH_BYTES = 512, 2**24
"""A batch to tokenize is complete when it has this many rows, or at least this many bytes."""
MOST_LISTED = 100_000
"""Maximum number of bad rows to list; a compressed file of a few megabytes can contain billions."""
_LONGEST_PROBLEM = 2000
ReadRow = Callable[[Row], Example]


@dataclass
class Counts:
    """What happened to the rows of one part (training or evaluation)."""

    rows: int = 0
    """Rows read, excluding bad ones."""
    kept: int = 0
    """Sequences kept for training or evaluation."""
    truncated: int = 0
    dropped_long: int = 0
    dropped_unsupervised: int = 0
    duplicates: int = 0
    """Rows with the same tokens as an earlier row; they are kept."""
    tokens: int = 0
    target_tokens: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of ``other``."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True)
class Fit:
    """Maximum length of a sequence, how to truncate longer rows, and what the loss covers."""

    max_length: int
    truncation: str
    train_on: TrainOn


@dataclass
class Tokenized:
    """What `tokenize` has written: each sequence's prompt and source, and counts by prompt."""

    keys: list[int]
    """For each sequence, the hash of its row's prompt."""
    sources: list[int]
    """For each sequence, the index of its source."""
    tallies: dict[tuple[int, int], Counts]
    """(hash of the prompt, source) -> counts of the rows with that prompt."""
    bad: int = 0
    """Number of skipped bad rows."""


def tokenize(
    sources: Iterable[tuple[int, Row]],
    read: ReadRow,
    tokenizer: PreTrainedTokenizerBase,
    fit: Fit,
    file: Path,
    bad_rows: Path,
    skip_bad: bool,
    progress: Callable[[int], None] | None = None,
) -> Tokenized:
    """Write an Arrow stream with ``input_ids`` (int32), ``learned`` (bool) and ``source`` (int32).

    For each skipped row, up to `MOST_LISTED`, a line of JSON with ``where`` and ``problem`` is written to ``bad_rows``.

    Raises:
        DataError: for the first bad row unless ``skip_bad``, naming its file and line; or if the tokenizer is not fast.
    """
    import pyarrow as pa

    if not tokenizer.is_fast:
        raise DataError("model.name: its tokenizer is not a fast one, so tokens cannot be mapped back to the text.")
    result, seen = Tokenized([], [], {}), set[bytes]()
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.bool_())), ("source", pa.int32())])
    rows = iter(sources)
    done = 0
    with (
        _all_cores(), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer,
        bad_rows.open("w", encoding="ascii") as listed,  # independent of the locale
    ):  # fmt: skip
        while batch := _next_batch(rows):
            pieces: list[tuple[Encoded, int]] = []
            for number, where, key, outcome in encoded_rows(batch, read, tokenizer, fit.train_on):
                if isinstance(outcome, DataError):
                    _pass_over(where, outcome, skip_bad, listed if result.bad < MOST_LISTED else None)
                    result.bad += 1
                    continue
                tally = Counts(rows=1)
                digest = hashlib.blake2b(outcome[0].tobytes(), digest_size=16).digest()
                tally.duplicates = int(digest in seen)
                seen.add(digest)
                for piece in fit_row(outcome, fit, tally):
                    pieces.append((piece, number))
                    result.keys.append(key)
                    result.sources.append(number)
                result.tallies.setdefault((key, number), Counts()).add(tally)
            if pieces:
                columns = [
                    pa.array([ids for (ids, _), _ in pieces], pa.list_(pa.int32())),
                    pa.array([learned for (_, learned), _ in pieces], pa.list_(pa.bool_())),
                    pa.array([number for _, number in pieces], pa.int32()),
                ]
                writer.write_batch(pa.record_batch(columns, schema))
            done += len(batch)
            if progress is not None:
                progress(done)
    return result


def encoded_rows(
    batch: list[tuple[int, Row]], read: ReadRow, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> Iterator[tuple[int, str, int, Encoded | DataError]]:
    """Yield (source, place, hash of the prompt, tokens or error) for each row, in order.

    Raises:
        DataError: if the chat template does not terminate: other rows would fail too, so the row is not skipped.
    """
    examples: list[Example | DataError] = []
    for _, row in batch:
        try:
            examples.append(read(row))
        except DataError as error:
            examples.append(error)
    good = [number for number, example in enumerate(examples) if isinstance(example, Example)]
    try:
        encoded = iter(encode_batch([e for e in examples if isinstance(e, Example)], tokenizer, train_on))
    except StuckTemplateError as error:
        raise DataError(f"data: {batch[good[error.number]][1].where}: {error}.") from error
    for (number, row), example in zip(batch, examples, strict=True):
        if isinstance(example, DataError):
            yield number, row.where, 0, example
        else:
            digest = hashlib.blake2b(example.prompt_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            yield number, row.where, int.from_bytes(digest, "little"), next(encoded)


def _next_batch(rows: Iterator[tuple[int, Row]]) -> list[tuple[int, Row]]:
    batch, size = [], 0
    for number, row in rows:
        batch.append((number, row))
        size += row.size
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            break
    return batch


def _pass_over(where: str, error: DataError, skip_bad: bool, listed: TextIO | None) -> None:
    problem = str(error)
    if len(problem) > _LONGEST_PROBLEM:  # the message may quote the row
        problem = f"{problem[:_LONGEST_PROBLEM]} ..."
    if not skip_bad:
        raise DataError(f"data: {where}: {problem}. (Set data.on_bad_row=skip to skip and list such rows.)") from error
    if listed is not None:
        listed.write(json.dumps({"where": where, "problem": problem}) + "\n")


class _Renamed(Mapping[str, Any]):
    """A row with its columns renamed to those of a format; cells are read only on access."""

    def __init__(self, values: Mapping[str, Any], columns: dict[str, str]) -> None:
        self._values, self._columns = values, columns

    def __getitem__(self, column: str) -> Any:
        return self._values[self._columns.get(column, column)]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._values), **dict.fromkeys(self._columns)})

    def __len__(self) -> int:
        return len(list(iter(self)))


def reader(
    row_format: str,
    columns: dict[str, str],
    convert: Callable[[dict], dict] | None,
    ignored: frozenset[str] = frozenset(),
) -> ReadRow:
    """Return a function that renames a row's columns, runs the user's function on it and reads it as an `Example`.

    ``ignored`` are message keys to drop.
    """

    def read(row: Row) -> Example:
        if row.values is None:
            raise DataError(row.problem)
        values = row.values
        if columns:
            missing = [theirs for theirs in columns.values() if theirs not in values]
            if missing:
                raise DataError(f"the row has no {missing[0]!r}, which data.columns names")
            values = _Renamed(values, columns)
        if convert is not None:
            values = dict(values)
            try:
                values = convert(values)
            except Exception as error:  # the user's code may raise anything; blame the row
                raise DataError(f"data.row_function: {type(error).__name__}: {error}") from error
        return read_row(values, row_format, ignored)

    return read


def fit_row(encoded: Encoded, fit: Fit, tally: Counts) -> Iterator[Encoded]:
    """Apply the truncation policy to one row; yield the sequences with supervised tokens and count in ``tally``."""
    ids, learned = encoded
    limit = fit.max_length
    pieces = [encoded]
    if len(ids) > limit:
        if fit.truncation == "drop":
            tally.dropped_long += 1
            return
        tally.truncated += 1
        if fit.truncation == "left":
            pieces = [(ids[-limit:], learned[-limit:])]
        elif fit.truncation == "right":
            pieces = [(ids[:limit], learned[:limit])]
        else:
            pieces = [(ids[i : i + limit], learned[i : i + limit]) for i in range(0, len(ids), limit)]
    for piece in pieces:
        targets = int(piece[1][1:].sum())  # nothing predicts the first token of a sequence
        if targets == 0:
            tally.dropped_unsupervised += 1
            continue
        tally.kept += 1
        tally.tokens += len(piece[0])
        tally.target_tokens += targets
        yield piece


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use all cores; elsewhere its parallelism is off, because ranks share the machine."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
