"""`prepare`: fetches the embedded model and data if the settings use them, and tokenizes, without a process group."""

from __future__ import annotations

import json

from fsdp_qlora.cli.embedded import fetch_embedded
from fsdp_qlora.cli.tables import print_table
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.deal import num_steps
from fsdp_qlora.data.loader import Rows
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.data.report import histogram, packing_efficiency
from fsdp_qlora.data.sources import names_of, not_read
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.plan.recipe import RowCounts, batch_for, epochs_for
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.tokens import prepare_tokens
from fsdp_qlora.track.console import clock


def run(config: RunConfig) -> int:
    """Prepare; return the exit code."""
    names = [config.model.name, *names_of(config.data.train or []), *names_of(config.data.eval or [])]
    if any(name.startswith(str(cache_folder() / "embedded")) for name in names):
        fetch_embedded(cache_folder())
    if config.data.train is None:
        print("data.train is not set: there is nothing to tokenize.")
        return 0
    data = prepare_tokens(config)
    if data.stream is not None:
        print(
            f"data.streaming: the training rows are read during training; {data.eval_counts.kept} held-out sequences "
            "are ready"
        )
        return 0
    train, held_out = data.train_counts, data.eval_counts
    print(
        f"ready: {train.kept} training sequences ({train.tokens} tokens, {train.target_tokens} supervised), "
        f"{held_out.kept} held out; model {config.model.name}"
    )
    if data.bad_rows is not None:
        print(f"{data.num_bad} bad row(s) were skipped; see {data.bad_rows}")
    for line in not_read(names_of(config.data.train) + names_of(config.data.eval or [])):
        print(line)
    if config.data.report:
        _report(config, data)
    return 0


def _report(config: RunConfig, data: PreparedData) -> None:
    rows, counts, train = data.some_rows(0), data.train_counts, config.train
    packed, filled = packing_efficiency(rows.lengths, config.data.max_length)
    num_rows = packed if config.data.packing else len(rows)
    counted = RowCounts(num_rows, data.eval_counts.kept)
    size, epochs = batch_for(train, counted), epochs_for(train, counted)
    steps = num_steps(train.max_steps, float(epochs.value), num_rows, int(size.value))
    table = [
        ("rows read", f"{counts.rows}"),
        ("sequences to learn from", f"{len(rows)}, {data.eval_counts.kept} held out"),
        ("tokens", f"{int(rows.lengths.sum())}, {int(rows.targets.sum())} supervised"),
        ("lengths", f"median {int(_quantile(rows, 50))}, 95 % up to {int(_quantile(rows, 95))}, longest "
                    f"{int(rows.lengths.max())}"),
        ("truncated", f"{counts.truncated} (data.max_length={config.data.max_length}, {config.data.truncation})"),
        ("dropped", f"{counts.dropped_long} too long, {counts.dropped_unsupervised} without a supervised token"),
        ("duplicate rows", f"{counts.duplicates} (kept)"),
        ("packed", f"{packed} sequences of {config.data.max_length} tokens, {100 * filled:.1f} % filled"),
        ("steps", f"{steps} of {size.value} " + ("packed sequences" if config.data.packing else "rows")
                  + ("" if train.max_steps else f": {epochs.value} epochs")),
        ("time", _time(config, rows, steps * int(size.value), num_rows)),
    ]  # fmt: skip
    print_table("the training data", table)
    print("\n".join(histogram(rows.lengths).lines()))


def _quantile(rows: Rows, percent: int) -> float:
    ordered = sorted(rows.lengths.tolist())
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _time(config: RunConfig, rows: Rows, trained: int, num_rows: int) -> str:
    """Estimate the time of so many rows from the speed of an earlier run of this name; say so if there is none."""
    summary = RunFolder(config.run.output_root, config.run.name).summary_file
    if not summary.is_file():
        return f"unknown: no run in {summary.parent} has measured a speed yet"
    speed = json.loads(summary.read_text(encoding="utf-8"))["tokens_per_second"]
    tokens = float(rows.lengths.sum()) / num_rows * trained
    return f"about {clock(tokens / max(speed, 1e-9))} at the {speed:.0f} tokens/s of the last run here"
