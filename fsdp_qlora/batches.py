"""Which batches a run trains on: from tokenized rows or a stream, padded, packed or laid end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsdp_qlora.api import Prepared
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.ahead import Ahead
from fsdp_qlora.data.loader import Cut, Loader, Rows, TokenRows
from fsdp_qlora.data.pack import PackedRows, PaddingFreeRows
from fsdp_qlora.data.stream import StreamLoader
from fsdp_qlora.errors import DataError
from fsdp_qlora.model.isolation import require_isolation
from fsdp_qlora.track.lines import read_lines, to_line
from fsdp_qlora.train.length import Length


@dataclass(frozen=True)
class Batches:
    """This rank's part of each global batch, and where they end."""

    batch_at: Ahead
    num_rows: int
    """Rows (packed: sequences) of an epoch; of a stream, all that are read."""
    length: Length


def build_batches(prepared: Prepared, bad_rows: Path) -> Batches:
    """Make the loader that the settings ask for. ``bad_rows`` lists what a stream passes over.

    Raises:
        ModelError: if rows that share a sequence would see each other.
    """
    assert prepared.data is not None
    train, data, seed = prepared.config.train, prepared.config.data, prepared.config.run.seed
    cut = Cut(train.micro_batch_size, prepared.ranks.rank, prepared.ranks.size, train.micro_batch_tokens)
    lay_out = _layout(prepared)
    if prepared.data.stream is not None:
        note = _bad_row_list(bad_rows) if prepared.ranks.is_main else _ignore
        loader = StreamLoader(prepared.data.stream, train.global_batch_size, cut, lay_out, note)
        read = train.max_steps * train.global_batch_size
        return Batches(Ahead(loader.batch_at, read), read, Length(train.global_batch_size, train.max_steps))
    assert prepared.data.train is not None
    rows = lay_out(TokenRows(prepared.data.train))
    loader = Loader(rows, train.global_batch_size, cut, seed, data.length_grouped)
    if train.max_steps:
        length = Length(train.global_batch_size, train.max_steps)
        return Batches(Ahead(loader.batch_at, train.max_steps * train.global_batch_size), len(rows), length)
    last = max(1, round(train.num_epochs * len(rows)))
    length = Length(train.global_batch_size, last_position=last)
    return Batches(Ahead(lambda position: loader.batch_at(position, last), last), len(rows), length)


def _layout(prepared: Prepared) -> Callable[[TokenRows], Rows]:
    """Return how rows become sequences; where they share one, the model must have shown that it keeps them apart."""
    data = prepared.config.data
    if not (data.packing or data.padding_free):
        return _as_they_are
    prepared.phases.enter("trying whether packed rows see each other")
    text_config = prepared.model.base.config.get_text_config()
    require_isolation(prepared.model, prepared.ranks, text_config.vocab_size, str(text_config._attn_implementation))
    return PaddingFreeRows if data.padding_free else lambda rows: _packed(rows, data.max_length, prepared.ranks.is_main)


def _as_they_are(rows: TokenRows) -> Rows:
    return rows


def _packed(rows: TokenRows, capacity: int, is_main: bool) -> PackedRows:
    packed = PackedRows(rows, capacity)
    if is_main:
        print(
            f"packing: {len(rows)} rows in {len(packed)} sequences of {capacity} tokens, "
            f"{100 * packed.efficiency:.1f} % filled",
            flush=True,
        )
    return packed


def _ignore(where: str, problem: DataError) -> None:
    """Leave it to the first rank."""


def _bad_row_list(file: Path) -> Callable[[str, DataError], None]:
    """Return what adds a row to the list, once: a resumed run may pass over it again."""
    known = {line["where"] for line in read_lines(file)} if file.is_file() else set()

    def note(where: str, problem: DataError) -> None:
        if where not in known:
            known.add(where)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(to_line({"where": where, "problem": str(problem)}))

    return note


def data_key(key: str, data: DataSettings) -> str:
    """Return what must be equal for the same rows to come in the same order."""
    return f"{key}{' packed' if data.packing else ''}{' length_grouped' if data.length_grouped else ''}"
