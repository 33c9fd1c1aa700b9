"""Tokenizes once, stores Arrow files, and memory-maps them in every process.

One process per node looks up the tokens in the cache, verifies their digests, and rebuilds them if that fails
(`fsdp_qlora.data.cache`); the others wait and open the same files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.auto import Choice
from fsdp_qlora.config.auto import number as typed
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.cache import hold, obtain
from fsdp_qlora.data.encoder import Counts, Read, RowEncoder
from fsdp_qlora.data.hold_out import HeldOut, choose_held_out, in_order
from fsdp_qlora.data.identity import code_digest, tokenizer_digest
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import Rows, StoredRows
from fsdp_qlora.data.mix import draw, mixture_counts
from fsdp_qlora.data.sources import fingerprint, names_of, read_source, stated
from fsdp_qlora.data.stream import Stream
from fsdp_qlora.data.tokens import ChatEncoder, Fit, ReadRow, Tokenized, column_reader, reader, tokenize
from fsdp_qlora.errors import DataError
from fsdp_qlora.files.module_path import look_here_last
from fsdp_qlora.shown import shown_source

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 5  # of the cache's content; changing it invalidates old caches
_TOKENS, _COUNTS, _BAD_ROWS = "tokens.arrow", "counts.json", "bad_rows.jsonl"
_NOT_IN_KEY = {
    "train", "eval", "packing", "padding_free", "length_grouped", "streaming", "shuffle_window", "report",
    "show_samples", "template", "allow_code",
}  # fmt: skip
Progress = Callable[[int], None]
"""Receives the number of rows read so far."""
Share = Callable[[Callable[[], str]], str]
"""Runs a function in one process per node and returns its result in every process."""


@dataclass(frozen=True)
class PreparedData:
    """Stored rows (the encoder's columns and ``source`` int32), memory-mapped."""

    encoder: RowEncoder
    train: Dataset | None
    """None if the training rows are streamed."""
    eval: Dataset | None
    train_counts: Counts
    eval_counts: Counts
    key: str
    """Changes with the sources, the tokenizer, its chat template, and every setting that affects the tokens."""
    train_sources: list[str] = field(default_factory=list)
    eval_sources: list[str] = field(default_factory=list)
    """Names of the sources, indexed by ``source`` (evaluation sources follow the training sources)."""
    bad_rows: Path | None = None
    """File that lists the skipped bad rows, up to `fsdp_qlora.data.tokens.MOST_LISTED`; None if there were none."""
    num_bad: int = 0
    """Number of skipped bad rows."""
    stream: Stream | None = None
    """The training rows, with ``data.streaming``."""
    held_out_why: str = ""
    """What ``data.eval_fraction=auto`` held out, and of how many rows."""
    held: BinaryIO | None = None
    """Kept open while the tokens are used, so that other processes do not remove them."""

    def some_rows(self, count: int) -> Rows:
        """Return training rows to look at: those of the first ``count`` rows of a stream, otherwise all."""
        if self.stream is not None:
            return self.stream.tokenize(list(islice(self.stream.rows(), count)))
        assert self.train is not None
        return self.encoder.rows(self.train)

    @property
    def held_out(self) -> StoredRows | None:
        """The evaluation rows, if there are any."""
        return None if self.eval is None else self.encoder.rows(self.eval)


def prepare_data(
    data: DataSettings,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    share: Share = lambda work: work(),
    progress: Progress | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    encoder: RowEncoder | None = None,
) -> PreparedData:
    """Return the stored rows; if they are not cached, one process per node, chosen by ``share``, makes them.

    Tokenizing runs inside the context ``around``; each call of ``progress`` shows that it is still making progress.
    ``encoder`` is the objective's; None is that of chats and texts.

    Raises:
        DataError: if a source is missing or malformed, there is nothing to learn, or the tokenizer is not fast.
    """
    if data.train is None:
        raise DataError("data.train: not set. Give a file, a folder, a hub data set, or a list of them.")
    _require_allowed(data)
    if encoder is None:
        encoder = ChatEncoder(_reader(data), fast(tokenizer), _fit(data))
    if data.streaming:
        return _streamed(data, seed, tokenizer, encoder, cache, share, progress)

    def make(staging: Path) -> None:
        with around():
            _prepare(data, seed, encoder, staging, progress)

    def settle() -> str:
        key = _key(data, seed, tokenizer, encoder)
        obtain(cache / "tokens" / key, partial(_opened, encoder), make)
        return key

    train = [shown_source(name) for name in names_of(data.train)]
    held = [shown_source(name) for name in names_of(data.eval or [])]
    # who made the tokens may have called the same rows by other names
    return replace(_opened(encoder, cache / "tokens" / share(settle)), train_sources=train, eval_sources=held or train)


def _opened(encoder: RowEncoder, folder: Path) -> PreparedData:
    from datasets import Dataset  # imported here so that code without data does not need `datasets`

    held = hold(folder)
    counts = json.loads((folder / _COUNTS).read_text(encoding="ascii"))
    rows = Dataset.from_file(str(folder / _TOKENS))
    parts = {n: rows.select(np.load(folder / f"{n}.npy")) if counts[n]["kept"] else None for n in ("train", "eval")}
    assert parts["train"] is not None
    return PreparedData(
        encoder, parts["train"], parts["eval"], Counts(**counts["train"]), Counts(**counts["eval"]), folder.name,
        bad_rows=folder / _BAD_ROWS if counts["bad"] else None, num_bad=counts["bad"], held=held,
        held_out_why=counts.get("held_out", ""),
    )  # fmt: skip


def _key(data: DataSettings, seed: int, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder) -> str:
    sources = [fingerprint(name) for name in (*names_of(data.train), *names_of(data.eval or []))]
    settings = {key: value for key, value in asdict(data).items() if key not in _NOT_IN_KEY}
    parts = [
        _VERSION, settings, seed, len(names_of(data.train)), sources, tokenizer_digest(tokenizer),
        code_digest(_function(data), *([data.row_function.partition(":")[0]] if data.row_function else [])),
        *([encoder.identity] if encoder.identity else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _prepare(data: DataSettings, seed: int, encoder: RowEncoder, staging: Path, progress: Progress | None) -> None:
    """Write the tokens and their metadata into an empty folder."""
    train, held = names_of(data.train), names_of(data.eval or [])
    rows = _numbered(train, held, data.max_rows)
    result = tokenize(rows, encoder, staging / _TOKENS, staging / _BAD_ROWS, data.on_bad_row == "skip", progress)
    chosen = _held_out(result, data, seed, staging / _TOKENS)
    parts, counts = _split(result, data, seed, len(train), set(chosen.keys))
    if counts["train"].kept == 0:
        raise _nothing_to_learn(counts["train"], data.max_length, result)
    for name, indices in parts.items():
        np.save(staging / f"{name}.npy", indices)
    about = {name: asdict(tally) for name, tally in counts.items()}
    about |= {"bad": result.bad, "held_out": chosen.why}
    (staging / _COUNTS).write_text(json.dumps(about), encoding="ascii")


def _streamed(
    data: DataSettings, seed: int, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder, cache: Path, share: Share,
    progress: Progress | None,
) -> PreparedData:  # fmt: skip
    """Prepare evaluation rows as usual, but for training rows only the stream that reads them."""
    sources = names_of(data.train)
    files = [line for name in sources for line in stated(name)]
    parts = [
        _key(replace(data, train=[]), seed, tokenizer, encoder),
        [shown_source(name) for name in sources],
        files,
        data.shuffle_window,  # it decides the order
    ]
    key = hashlib.sha256(json.dumps(parts).encode())
    stream = Stream(
        sources, data.weights, data.shuffle_window, seed, _reader(data), tokenizer, _fit(data),
        data.on_bad_row == "skip",
    )  # fmt: skip
    made = PreparedData(encoder, None, None, Counts(), Counts(), key.hexdigest()[:24], stream=stream)
    if data.eval is None:
        return made
    own = replace(data, train=data.eval, eval=None, eval_fraction=0.0, streaming=False, weights=None, max_rows=None)
    evaluation = prepare_data(own, seed, tokenizer, cache, share, progress)
    return replace(
        made, eval=evaluation.train, eval_counts=evaluation.train_counts, eval_sources=evaluation.train_sources,
        bad_rows=evaluation.bad_rows, num_bad=evaluation.num_bad, held=evaluation.held,
    )  # fmt: skip


def _reader(data: DataSettings) -> ReadRow:
    return reader(data.format, data.columns, _function(data), frozenset(data.ignore_keys))


def columns_of(data: DataSettings) -> Read:
    """Return what reads the columns of a raw row, for an objective's encoder.

    Raises:
        DataError: if ``data.row_function`` is not allowed or cannot be imported.
    """
    _require_allowed(data)
    return column_reader(data.columns, _function(data))


def fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer if it can map tokens back to the text.

    Raises:
        DataError: if it cannot.
    """
    if not tokenizer.is_fast:
        raise DataError("model.name: its tokenizer is not a fast one, so tokens cannot be mapped back to the text.")
    return tokenizer


def _fit(data: DataSettings) -> Fit:
    return Fit(data.max_length, data.truncation, data.train_on)


def _numbered(train: list[str], held: list[str], max_rows: int | None) -> Iterator[tuple[int, Row]]:
    """Yield (source index, row); evaluation sources follow the training sources."""
    rows = ((number, row) for number, name in enumerate(train) for row in read_source(name))
    yield from islice(rows, max_rows) if max_rows else rows
    for number, name in enumerate(held, start=len(train)):
        for row in read_source(name):
            yield number, row


def held_out_choice(data: DataSettings, prepared: PreparedData | None) -> dict[str, Choice]:
    """Return what ``data.eval_fraction=auto`` held out, by key, if it was asked to."""
    if prepared is None or data.eval is not None or data.streaming or typed(data.eval_fraction) is not None:
        return {}
    share = prepared.eval_counts.kept / max(1, prepared.eval_counts.kept + prepared.train_counts.kept)
    return {"data.eval_fraction": Choice(f"{share:.2g}", prepared.held_out_why)}


def _held_out(result: Tokenized, data: DataSettings, seed: int, tokens: Path) -> HeldOut:
    """Return the prompts that are held out of the training sources: none, ``eval_fraction`` of them, or ``auto``'s."""
    if data.eval is not None or data.eval_fraction == 0:
        return HeldOut(frozenset(), "")
    if (fraction := typed(data.eval_fraction)) is None:
        return choose_held_out(result.keys, seed, tokens)
    distinct = in_order({key for key, _ in result.tallies}, seed)
    chosen = distinct[: max(1, round(fraction * len(distinct)))]
    if len(chosen) == len(distinct):
        raise DataError(f"data.eval_fraction: with {len(distinct)} distinct prompt(s), nothing is left to train on.")
    return HeldOut(frozenset(chosen), "")


def _split(
    result: Tokenized, data: DataSettings, seed: int, num_train: int, chosen: set[int]
) -> tuple[dict[str, np.ndarray], dict[str, Counts]]:
    """Return the sequence indices of the training and evaluation parts, and the counts of their rows.

    The evaluation part holds the sequences of the sources in ``data.eval``, or those of the ``chosen`` prompts.
    """
    sources = np.array(result.sources, dtype=np.int64)
    keys = np.array(result.keys, dtype=np.uint64)
    counts = {"train": Counts(), "eval": Counts()}
    held_out = sources >= num_train if data.eval is not None else np.isin(keys, np.array(sorted(chosen), np.uint64))
    for (key, number), tally in result.tallies.items():
        counts["eval" if key in chosen or number >= num_train else "train"].add(tally)
    train, held = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    sizes = [int((sources[train] == number).sum()) for number in range(num_train)]
    wanted = mixture_counts(sizes, data.weights, data.temperature, data.counts)
    if wanted is not None:
        train = train[draw(sources[train], wanted, seed)]
        counts["train"].kept = len(train)
    return {"train": train, "eval": held}, counts


def _nothing_to_learn(counts: Counts, max_length: int, result: Tokenized) -> DataError:
    return DataError(
        f"data: none of the {counts.rows} rows has a supervised token to learn from "
        f"({counts.dropped_unsupervised} without an answer within data.max_length={max_length}, "
        f"{counts.dropped_long} dropped as too long, {result.bad} skipped as bad)."
    )


def _require_allowed(data: DataSettings) -> None:
    if data.row_function is not None and not data.allow_code:
        raise DataError(f"data.row_function: {data.row_function} is your own code; set data.allow_code=true to run it.")


def _function(data: DataSettings) -> Callable[[dict], dict] | None:
    """Import the user's row function, which `_require_allowed` has checked; None if none is set."""
    if data.row_function is None:
        return None
    look_here_last()
    module, _, name = data.row_function.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything when imported
        raise DataError(
            f"data.row_function: expected module:function; loading {data.row_function}: {type(error).__name__}: {error}"
        ) from error
