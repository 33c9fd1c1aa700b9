"""start.json: what a run knew before its first step, for reports and for `watch`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from fsdp_qlora.data.report import histogram
from fsdp_qlora.data.sources import names_of
from fsdp_qlora.plan.quantized import describe
from fsdp_qlora.run.training import Training
from fsdp_qlora.shown import shown_source


def started(training: Training) -> dict[str, Any]:
    """Return what is known before the first step: lengths in tokens, memory in bytes, times in seconds since 1970."""
    prepared, progress = training.prepared, training.progress
    plan, load = prepared.plan, prepared.load
    return {
        "time": time.time(),
        "from_step": progress.step,
        "total_steps": training.batches.length.total_steps(progress),
        "world_size": prepared.ranks.size,
        "device": str(prepared.ranks.device),
        "threads_per_rank": prepared.threads,
        "model": {
            "base_parameters": plan.base_parameters,
            "trainable_parameters": plan.trainable_parameters,
            "quantized_linears": describe(plan.quantized),
            "quantized_in_the_files": load.stored,
            "file_bytes": load.file_bytes,
        },
        "load_seconds": load.seconds,
        "plan": plan.to_dict(),
        "process_bytes": prepared.process_bytes,
        "auto": {key: {"value": choice.value, "why": choice.why} for key, choice in prepared.choices.items()},
        "data": _data(training),
    }


def _data(training: Training) -> dict[str, Any]:
    """Return what became of the rows, and how long they are."""
    data, config, lengths = training.prepared.data, training.config.data, training.batches.lengths
    if data is None:
        return {}
    return {
        "train": [shown_source(name) for name in names_of(config.train)],
        "eval": [shown_source(name) for name in names_of(config.eval or [])],
        "streamed": data.stream is not None,
        "rows_per_epoch": training.batches.num_rows,
        "training_rows": asdict(data.train_counts),
        "held_out_rows": asdict(data.eval_counts),
        "bad_rows": data.num_bad,
        "lengths": None if lengths is None or not len(lengths) else _lengths(lengths),
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    ordered = np.sort(lengths)
    at = {percent: int(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]) for percent in (50, 95)}
    return {
        "shortest": int(ordered[0]),
        "median": at[50],
        "longer_than_95_percent": at[95],
        "longest": int(ordered[-1]),
        "histogram": asdict(histogram(lengths)),
    }
