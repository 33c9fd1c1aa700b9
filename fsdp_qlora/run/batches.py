"""Builds a run's batches from tokenized rows or a stream, and marks those that should not run compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fsdp_qlora.attention.layout import Layout
from fsdp_qlora.checks.isolation import try_isolation
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.ahead import Ahead
from fsdp_qlora.data.forms import mark_rare, usual_forms
from fsdp_qlora.data.limits import tokens_known
from fsdp_qlora.data.loader import Batch, Cut, Loader, MicroBatch, TokenRows
from fsdp_qlora.data.stream import StreamLoader
from fsdp_qlora.errors import DataError
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.tokens import known_ids
from fsdp_qlora.track.lines import Appended, read_lines, to_line, write_lines
from fsdp_qlora.track.unwritten import Unwritten
from fsdp_qlora.train.length import Length

_SEEN_ROWS = 1000
"""Rows whose micro-batches are inspected to find the usual forms."""


@dataclass(frozen=True)
class Batches:
    """This rank's part of each global batch, and the length of the run."""

    batch_at: Ahead
    num_rows: int
    """Rows per epoch (sequences if packed); for a stream, all rows that the run reads."""
    length: Length
    lengths: np.ndarray | None = None
    """int64: tokens of each training row before packing; None for a stream."""


def build_batches(prepared: Prepared, bad_rows: Path, unwritten: Unwritten) -> Batches:
    """Build the loader for these settings.

    Args:
        prepared: the model, settings and data.
        bad_rows: file that lists the rows skipped in a stream.
        unwritten: records when that file cannot be written.

    Raises:
        ModelError: if rows that share a sequence would attend to each other.
    """
    assert prepared.data is not None
    train, data, seed = prepared.config.train, prepared.config.data, prepared.config.run.seed
    size = prepared.recipe.rows_per_step
    cut = Cut(train.micro_batch_size, prepared.ranks.data_rank, prepared.ranks.data_size, train.micro_batch_tokens)
    if not build_objective(prepared.settings.objective).of_tokens:
        return _rows_alone(prepared, cut)
    attention = prepared.settings.model.attn_implementation
    compiled = prepared.model.compiled_layers is not None
    layout = Layout.of(prepared.config.data, prepared.config.train, attention, compiled, prepared.ranks.is_main)
    if layout.shared_rows is not None:
        prepared.ranks.phases.enter("checking whether rows that share a sequence leak into each other")
        try_isolation(prepared.model, layout, prepared.ranks)
    if prepared.data.stream is not None:
        note = _bad_row_list(bad_rows, unwritten) if prepared.ranks.is_main else _ignore
        known = tokens_known(prepared.tokenizer, known_ids(prepared.config, prepared.shapes, prepared.tokenizer))
        streamed = StreamLoader(
            prepared.data.stream, size, cut, lambda rows: layout(known(rows)), note
        )  # fmt: skip
        read = train.max_steps * size
        length = Length(size, train.max_steps)
        return Batches(
            _ahead(marked(streamed.batch_at, prepared, layout, []), read, prepared.ranks.device), read, length
        )
    assert prepared.data.train is not None
    stored = TokenRows(prepared.data.train)
    rows = layout(stored)
    loader = Loader(rows, size, cut, seed, data.length_grouped)
    last, length, end = _extent(prepared, len(rows))
    first = Loader(rows, size, replace(cut, rank=0, num_ranks=1), seed, data.length_grouped)
    batch_at = marked(
        lambda position: loader.batch_at(position, last), prepared, layout, _first_batches(first, length.planned_steps)
    )
    return Batches(_ahead(batch_at, end, prepared.ranks.device), len(rows), length, stored.lengths)


def _rows_alone(prepared: Prepared, cut: Cut) -> Batches:
    """Build the loader of an objective whose rows share no sequence."""
    data, size = prepared.data, prepared.recipe.rows_per_step
    assert data is not None and data.train is not None
    seed = prepared.config.run.seed
    rows = data.encoder.training_rows(data.train, seed)
    loader = Loader(rows, size, cut, seed, prepared.config.data.length_grouped)
    last, length, end = _extent(prepared, len(rows))
    ahead = _ahead(lambda position: loader.batch_at(position, last), end, prepared.ranks.device)
    return Batches(ahead, len(rows), length, rows.lengths)


def _extent(prepared: Prepared, num_rows: int) -> tuple[int | None, Length, int]:
    """Return the last row of a run that is counted in epochs, its length in steps, and the row before which it ends."""
    max_steps, size = prepared.config.train.max_steps, prepared.recipe.rows_per_step
    last = None if max_steps else max(1, round(prepared.recipe.num_epochs * num_rows))
    return last, Length(size, max_steps, last or 0), last or max_steps * size


def _first_batches(loader: Loader, steps: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of all ranks for the first steps, about `_SEEN_ROWS` rows of them."""
    size = loader.global_batch_size
    for step in range(max(1, min(steps, _SEEN_ROWS // size))):
        yield from loader.batch_at(step * size).micro_batches


def marked(
    batch_at: Callable[[int], Batch], prepared: Prepared, layout: Layout, first: Iterable[MicroBatch]
) -> Callable[[int], Batch]:
    """Return ``batch_at``, marking micro-batches of rare forms so that compiled layers run them eagerly.

    Args:
        batch_at: returns this rank's part of each global batch.
        prepared: the model and settings; without compiled layers, ``batch_at`` is returned unchanged.
        layout: how rows are laid out in a micro-batch.
        first: micro-batches that show the usual forms. Empty for a stream, whose forms follow from the settings.
    """
    if (layers := prepared.model.compiled_layers) is None:
        return batch_at
    turning_points = layout.turning_points(prepared.model.base.config.get_text_config())
    usual = usual_forms(first, turning_points, layers.max_forms) or layout.expected_forms(
        len(turning_points), layers.max_forms
    )
    return mark_rare(batch_at, usual, turning_points)


def _ahead(batch_at: Callable[[int], Batch], end: int, device: torch.device) -> Ahead:
    """Build batches ahead; for an accelerator in pinned memory, from where no copy to it waits for its other work."""

    def pinned(position: int) -> Batch:
        batch = batch_at(position)
        return replace(batch, micro_batches=[micro_batch.pinned() for micro_batch in batch.micro_batches])

    return Ahead(batch_at if device.type == "cpu" else pinned, end)


def _ignore(where: str, problem: DataError) -> None:
    """Ignore a bad row, as rank 0 lists it."""


def _bad_row_list(file: Path, unwritten: Unwritten) -> Callable[[str, DataError], None]:
    """Return a function that adds a bad row to the list once, as a resumed run may skip it again."""
    before = read_lines(file) if file.is_file() else []
    if before:
        write_lines(file, before)  # drops an incomplete last line
    known, lines = {line["where"] for line in before}, Appended(file, unwritten)

    def note(where: str, problem: DataError) -> None:
        if where not in known:
            known.add(where)
            lines.add(to_line({"where": where, "problem": str(problem)}))

    return note


def data_key(key: str, data: DataSettings) -> str:
    """Return a key that is equal if the same rows come in the same order."""
    return f"{key}{' packed' if data.packing else ''}{' length_grouped' if data.length_grouped else ''}"
