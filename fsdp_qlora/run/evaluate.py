"""Computes the held-out loss of a prepared model, source by source."""

from __future__ import annotations

import numpy as np

from fsdp_qlora.data.loader import Cut, StoredRows, cut_rows, weights_of
from fsdp_qlora.errors import DataError
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
    for source in sorted(set(rows.sources.tolist())):
        chosen = np.flatnonzero(rows.sources == source).tolist()
        cut = Cut(config.train.eval_batch_size, ranks.data_rank, ranks.data_size)
        total = -(-len(cut.pieces(rows, chosen)) // ranks.data_size)
        batches = counted(cut_rows(rows, chosen, cut), "evaluating", total, ranks.is_main)
        part = evaluate(prepared.model, batches, objective, weights_of(rows, chosen), ranks)
        parts[_source_name(prepared, source)] = part
    return together(parts, objective)


def _source_name(prepared: Prepared, source: int) -> str:
    assert prepared.data is not None
    names = [shown_source(name) for name in (*prepared.data.train_sources, *prepared.data.eval_sources)]
    name = names[source]
    return (
        name
        if names.count(name) == 1 or prepared.data.train_sources == prepared.data.eval_sources
        else f"{name} ({source})"
    )
