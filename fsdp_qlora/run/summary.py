"""Builds the summary.json of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fsdp_qlora.data.sources import names_of
from fsdp_qlora.distributed.memory import memory_peak
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.samples import SamplePrompt
from fsdp_qlora.shown import shown_source
from fsdp_qlora.track.meter import Meter
from fsdp_qlora.train.progress import Progress


def summarize(
    prepared: Prepared, progress: Progress, meter: Meter, num_rows: int, prompts: Sequence[SamplePrompt],
    before: Sequence[str | None], after: Sequence[str], adapter_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the summary; every rank calls it. ``before`` has None for an answer that is not known."""
    config, ranks = prepared.config, prepared.ranks
    peak, kind = memory_peak(ranks.device)
    own = {
        "rank": ranks.rank,
        "bytes_read": prepared.load.bytes_read,
        "quantized_bytes": prepared.load.quantized_bytes,
        "peak_memory_bytes": peak,
        "process_bytes": prepared.process_bytes,
    }
    speed = meter.total_tokens / max(1e-9, meter.total_seconds)
    all_ranks = gather_json(own, ranks)
    return {
        "steps": progress.step,
        "eval_loss_before": progress.first_eval_loss,
        "eval_loss_after": progress.last_eval_loss,
        "metrics_before": progress.first_metrics,
        "metrics_after": progress.last_metrics,
        "tokens_per_second": speed,
        "tokens": progress.tokens,
        "target_tokens": progress.target_tokens,
        "rows_left_out": progress.rows_left_out,
        "trainable_parameters": prepared.plan.trainable_parameters,
        "base_parameters": prepared.plan.base_parameters,
        "adapter_bytes": adapter_bytes,
        "model_file_bytes": prepared.load.file_bytes,
        "memory_kind": kind,
        "auto": {key: str(choice) for key, choice in prepared.choices.items()},
        "planned_bytes_per_rank": prepared.plan.peak,
        "process_bytes": max(each["process_bytes"] for each in all_ranks),
        "answers": build_objective(prepared.settings.objective).of_tokens,
        "device": str(ranks.device),
        "threads_per_rank": prepared.threads,
        "load_seconds": prepared.load.seconds,
        "data": {"train": [shown_source(name) for name in names_of(config.data.train)], "rows": num_rows},
        "samples": [
            {"prompt": p.text, "before": b, "after": a} | ({} if p.wanted is None else {"wanted": p.wanted})
            for p, b, a in zip(prompts, before, after, strict=True)
        ],
        "ranks": all_ranks,
    }  # fmt: skip
