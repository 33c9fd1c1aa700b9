"""Computes the held-out loss of a prepared model, source by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fsdp_qlora.data.columns import ColumnRows
from fsdp_qlora.data.loader import Cut, StoredRows, cut_rows, weights_of
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.errors import DataError
from fsdp_qlora.inference.targets import greedy_config, write_targets
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.shown import shown_source
from fsdp_qlora.track.bars import counted
from fsdp_qlora.train.evaluate import Evaluation, evaluate, together


def evaluate_prepared(prepared: Prepared) -> Evaluation:
    """Evaluate a prepared model on its held-out rows. Every rank calls it.

    Raises:
        DataError: if it has none.
    """
    if prepared.data is None or (rows := prepared.data.held_out) is None:
        raise DataError("data.eval: there is nothing to evaluate on; set data.eval or data.eval_fraction.")
    return evaluate_rows(prepared, rows)


def evaluate_rows(prepared: Prepared, rows: StoredRows) -> Evaluation:
    """Evaluate a prepared model on rows, source by source. Every rank calls it."""
    ranks, config = prepared.ranks, prepared.config
    objective, parts = build_objective(prepared.settings.objective), {}
    written = _spread(len(rows), prepared.settings.objective.generate_rows) if objective.writes else set()
    for source in sorted(set(rows.sources.tolist())):
        chosen = np.flatnonzero(rows.sources == source).tolist()
        cut = Cut(config.train.eval_batch_size, ranks.data_rank, ranks.data_size)
        total = -(-len(cut.pieces(rows, chosen)) // ranks.data_size)
        batches = counted(cut_rows(rows, chosen, cut), "evaluating", total, ranks.is_main)
        part = evaluate(prepared.model, batches, objective, weights_of(rows, chosen), ranks)
        if own := [row for row in chosen if row in written]:
            texts = _written(prepared, rows, own)
            part = replace(part, observed=texts, metrics=part.metrics | objective.score(texts))
        parts[_source_name(prepared, source)] = part
    return together(parts, objective)


def _spread(count: int, most: int) -> set[int]:
    """Return at most ``most`` of the numbers below ``count``, as evenly spread as they can be."""
    return {number * count // most for number in range(most)} if most < count else set(range(count))


def _written(prepared: Prepared, rows: StoredRows, chosen: Sequence[int]) -> list[tuple[str, str]]:
    """Return what the model writes for these rows, and what was wanted. Every rank calls it."""
    assert isinstance(rows, ColumnRows)
    config, ranks = prepared.settings, prepared.ranks
    ranks.phases.enter(f"writing the targets of {len(chosen)} held-out rows")
    more = build_objective(config.objective).writing(prepared.tokenizer, prepared.model.base.config)
    greedy = on_every(lambda: greedy_config(prepared.folder, prepared.model.base, more), ranks)
    batch_size = config.train.eval_batch_size
    return write_targets(prepared.model, prepared.tokenizer, rows, chosen, greedy, batch_size, ranks)


def _source_name(prepared: Prepared, source: int) -> str:
    assert prepared.data is not None
    names = [shown_source(name) for name in (*prepared.data.train_sources, *prepared.data.eval_sources)]
    name = names[source]
    return (
        name
        if names.count(name) == 1 or prepared.data.train_sources == prepared.data.eval_sources
        else f"{name} ({source})"
    )
