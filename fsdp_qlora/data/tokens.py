"""Rows -> an Arrow file of token ids, with counts of what happened to the rows and a list of bad ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example, read_row
from fsdp_qlora.data.encode import Encoded, StuckTemplateError, TrainOn, encode_batch
from fsdp_qlora.data.encoder import Counts, Outcome, Read, RowEncoder, Stored
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows, TokenRows
from fsdp_qlora.data.samples import Segment, segments
from fsdp_qlora.data.template import ChatTemplate
from fsdp_qlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH, _BATCH_BYTES = 512, 2**24
"""A batch to tokenize is complete when it has this many rows, or at least this many bytes."""
MOST_LISTED = 100_000
"""Maximum number of bad rows to list; a compressed file of a few megabytes can contain billions."""
_LONGEST_PROBLEM = 2000
ReadRow = Callable[[Row], Example]


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


class ChatEncoder(RowEncoder):
    """Stores chats and texts as tokens, with which of them are learned."""

    columns: ClassVar = {"input_ids": "int32[]", "learned": "bool[]"}

    def __init__(self, read: ReadRow, tokenizer: PreTrainedTokenizerBase, fit: Fit) -> None:
        self._read, self._tokenizer, self._fit = read, tokenizer, fit

    def encode(self, batch: list[tuple[int, Row]]) -> Iterator[tuple[int, str, Outcome]]:
        """Yield the source, the place and the sequences of each row."""
        for number, where, key, outcome in encoded_rows(batch, self._read, self._tokenizer, self._fit.train_on):
            if isinstance(outcome, DataError):
                yield number, where, outcome
                continue
            stored = Stored(key, hashlib.blake2b(outcome[0].tobytes(), digest_size=16).digest())
            for ids, learned in fit_row(outcome, self._fit, stored.counts):
                stored.items.append({"input_ids": ids, "learned": learned})
            yield number, where, stored

    def rows(self, data: Dataset) -> TokenRows:
        """Return stored sequences as rows."""
        return TokenRows(data)

    def segments(self, rows: Rows, number: int) -> list[Segment]:
        """Return row ``number`` with its learned parts."""
        assert isinstance(rows, TokenRows)
        return segments(rows, number, self._tokenizer)


def tokenize(
    sources: Iterable[tuple[int, Row]],
    encoder: RowEncoder,
    file: Path,
    bad_rows: Path,
    skip_bad: bool,
    progress: Callable[[int], None] | None = None,
) -> Tokenized:
    """Write an Arrow stream with the encoder's columns and ``source`` (int32).

    For each skipped row, up to `MOST_LISTED`, a line of JSON with ``where`` and ``problem`` is written to ``bad_rows``.

    Raises:
        DataError: for the first bad row unless ``skip_bad``, naming its file and line.
    """
    import pyarrow as pa

    result, seen = Tokenized([], [], {}), set[bytes]()
    kinds = {name: _arrow_type(kind) for name, kind in encoder.columns.items()} | {"source": pa.int32()}
    schema = pa.schema(list(kinds.items()))
    rows = iter(sources)
    done = 0
    with (
        _all_cores(), pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer,
        bad_rows.open("w", encoding="ascii") as listed,  # independent of the locale
    ):  # fmt: skip
        while batch := _next_batch(rows):
            items: list[dict[str, Any]] = []
            for number, where, outcome in encoder.encode(batch):
                if isinstance(outcome, DataError):
                    _pass_over(where, outcome, skip_bad, listed if result.bad < MOST_LISTED else None)
                    result.bad += 1
                    continue
                outcome.counts.duplicates = int(outcome.digest in seen)
                seen.add(outcome.digest)
                items += [item | {"source": number} for item in outcome.items]
                result.keys += [outcome.key] * len(outcome.items)
                result.sources += [number] * len(outcome.items)
                result.tallies.setdefault((outcome.key, number), Counts()).add(outcome.counts)
            if items:
                columns = [pa.array([item[name] for item in items], kind) for name, kind in kinds.items()]
                writer.write_batch(pa.record_batch(columns, schema))
            done += len(batch)
            if progress is not None:
                progress(done)
    return result


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    one = pa.type_for_alias(kind.removesuffix("[]"))
    return pa.list_(one) if kind.endswith("[]") else one


def encoded_rows(
    batch: list[tuple[int, Row]], read: ReadRow, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn,
    kind: type[ChatTemplate] = ChatTemplate,
) -> Iterator[tuple[int, str, int, Encoded | DataError]]:  # fmt: skip
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
        encoded = iter(encode_batch([e for e in examples if isinstance(e, Example)], tokenizer, train_on, kind))
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
    values_of = column_reader(columns, convert)
    return lambda row: read_row(values_of(row), row_format, ignored)


def column_reader(columns: dict[str, str], convert: Callable[[dict], dict] | None) -> Read:
    """Return a function that renames a row's columns and runs the user's function on it.

    The function raises DataError if the row cannot be read, or lacks a column that is to be renamed.
    """

    def read(row: Row) -> Mapping[str, Any]:
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
        return values

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
