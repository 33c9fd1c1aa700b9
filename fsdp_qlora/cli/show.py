"""Prints what `train` shows the user: the start of a run, its result, and the next command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fsdp_qlora.cli.closing import print_next, print_verdict, sample_rows
from fsdp_qlora.cli.tables import print_table
from fsdp_qlora.data.sources import names_of
from fsdp_qlora.files.write import copy_regular
from fsdp_qlora.plan.quantized import describe
from fsdp_qlora.profile.phases import PHASES, WAITING
from fsdp_qlora.quant.backend import bitsandbytes_backend
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.shapes.patterns import endings
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import console, megabytes
from fsdp_qlora.track.lines import write_lines

_SHOWN = 160


def print_start(prepared: Prepared, note: str) -> None:
    """Print a description of the run that is about to start."""
    plan, config, data = prepared.plan, prepared.config, prepared.data
    if note:
        print(note)
    quant = describe(plan.quantized)
    if plan.quantized:
        quant += f" by {bitsandbytes_backend(prepared.ranks.device)}"
    dense = [n.removesuffix(".weight") for n in prepared.shapes.left_dense if len(prepared.shapes.parameters[n]) > 1]
    if plan.quantized and dense:
        quant += f"; left dense, as upstream's own quantization does: {len(dense)} ({', '.join(endings(dense))})"
    if prepared.load.stored:
        quant += f" ({prepared.load.stored} of them already quantized in the files)"
    print(
        f"{prepared.ranks.size} rank(s) on {prepared.ranks.device.type} ({prepared.threads} thread(s) each), "
        f"shard {plan.shard_size} x replicate {prepared.ranks.num_replicas}; {config.model.name}: "
        f"{plan.base_parameters / 1e6:.1f} M parameters, quantized linears: {quant}, "
        f"{plan.trainable_parameters / 1e6:.2f} M trainable; loaded in {prepared.load.seconds:.1f} s"
    )
    print(
        f"global batch {plan.batch.global_batch_size} rows = micro-batches of {plan.batch.micro_batch_size} x "
        f"{plan.batch.accumulation_steps} per rank; planned peak {megabytes(plan.peak)} of tensors per rank"
    )
    for key, value in prepared.choices.items():
        print(f"auto: {key}={value}")
    if data is not None and data.stream is not None:
        print(
            f"data: streamed, {config.data.shuffle_window} rows shuffled at a time; {data.eval_counts.kept} held out",
            flush=True,
        )
    elif data is not None:
        counts, held = data.train_counts, data.eval_counts
        print(
            f"data: {counts.kept} training sequences, {counts.tokens} tokens, {counts.target_tokens} supervised; "
            f"{held.kept} held out; truncated {counts.truncated + held.truncated}, dropped "
            f"{counts.dropped_long + held.dropped_long} too long and "
            f"{counts.dropped_unsupervised + held.dropped_unsupervised} without supervised tokens",
            flush=True,
        )
    if data is not None:
        for line in data.encoder.not_read(names_of(config.data.train) + names_of(config.data.eval or [])):
            print(line, flush=True)


def print_samples(prepared: Prepared, folder: RunFolder) -> None:
    """Print the first sequences with learned tokens marked; write them in full to the run folder."""
    if prepared.data is None:
        return
    count = prepared.config.data.show_samples
    rows = prepared.data.some_rows(count)
    lines = []
    screen = console(soft_wrap=True)
    for number in range(min(count, len(rows))):
        sample = prepared.data.encoder.segments(rows, number)
        lines.append([asdict(s) for s in sample])
        text = Text(f"sample {number + 1}, learned in [brackets]: ")
        for segment in sample:
            shown = visible(segment.text.replace("\n", "\\n"))
            shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} ... {shown[-_SHOWN // 2 :]}"
            text.append(f"[{shown}]" if segment.learned else shown, style="green" if segment.learned else "dim")
        screen.print(text)
    write_lines(folder.path / "samples.jsonl", lines)
    if prepared.data.bad_rows is not None:
        copy_regular(prepared.data.bad_rows, folder.bad_rows)
        print(f"{prepared.data.num_bad} bad row(s) were skipped; see {folder.bad_rows}", flush=True)


def print_stopped(checkpoint: Path | None) -> None:
    """Print how to resume after a signal, given the checkpoint that was saved, if any."""
    state = f"saved {checkpoint}" if checkpoint is not None else "there was nothing to save"
    print(f"stopped by a signal: {state}; to resume, run the same command with checkpoint.resume=auto.", flush=True)


def print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print the table at the end of a run."""
    rows: list[tuple[str, str]] = []
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    if before is not None and after is not None:
        rows.append(("held-out loss", f"{before:.4f} -> {after:.4f}"))
        first, last = summary.get("metrics_before", {}), summary.get("metrics_after", {})
        rows += [(f"held-out {name}", f"{first[name]:.2f} -> {last[name]:.2f}") for name in first if name in last]
    rows += sample_rows(summary["samples"])
    trainable, base = summary["trainable_parameters"], summary["base_parameters"]
    rows.append(("trainable parameters", f"{trainable:,} ({100 * trainable / base:.2f} % of the base)"))
    kind, result = ("model", folder.model) if trainable == base else ("adapter", folder.adapter)
    rows.append((f"{kind} size", f"{summary['adapter_bytes'] / 1e6:.1f} MB"))
    rows.append(("speed", f"{summary['tokens_per_second']:.0f} tokens/s over {summary['steps']} steps"))
    rows += _rank_rows(summary)
    rows.append(("run folder", str(folder.path)))
    rows.append((kind, str(result)))
    print_table(f"{folder.path.name}: done", rows)
    print_verdict(summary, folder)
    print_next(summary, folder, "model.name" if kind == "model" else kind, result)
    if "profile" in summary:
        print_profile(summary["profile"])


def print_profile(profile: dict[str, Any]) -> None:
    """Print where the time of the recorded steps went, on rank 0 and on the slowest rank if that is another."""
    ranks = profile["ranks"]
    steps = ranks[0]["steps"]
    table = Table(title=f"seconds per step (mean of steps {steps[0]} to {steps[-1]})", title_justify="left")
    table.add_column("phase", style="bold", no_wrap=True)
    for rank in ranks:
        table.add_column(f"rank {rank['rank']}", justify="right", no_wrap=True)
    table.add_column("what")
    for phase, what in PHASES.items():
        cells = [_of_step(rank, rank["phases"][phase]) for rank in ranks]
        table.add_row(phase, *cells, what, end_section=phase == WAITING)
    table.add_row("step", *[_of_step(rank, rank["step_seconds"]) for rank in ranks], "sum of these rows")
    console().print(table)
    for rank in ranks:
        waiting, least = rank["waiting"], len(ranks) > 1 and rank["rank"] == profile["slowest_rank"]
        print(
            f"rank {rank['rank']}{' (waits least, so it is the slowest)' if least else ''}: of the waiting "
            f"{waiting['in_collectives']:.4f} s while a collective was running; {profile['folder']}/{rank['trace']}"
        )


def _of_step(rank: dict[str, Any], seconds: float) -> str:
    return f"{seconds:.4f} {100 * seconds / rank['step_seconds']:5.1f} %"


def _rank_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    ranks, whole = summary["ranks"], summary["model_file_bytes"]
    packed = sum(r["quantized_bytes"] for r in ranks) or 1
    each = [
        ("peak memory", "peak_memory_bytes", lambda r: megabytes(r["peak_memory_bytes"])),
        ("bytes read", "bytes_read", lambda r: f"{megabytes(r['bytes_read'])} ({100 * r['bytes_read'] / whole:.1f} %)"),
        (
            "quantized bytes",
            "quantized_bytes",
            lambda r: f"{megabytes(r['quantized_bytes'])} ({100 * r['quantized_bytes'] / packed:.1f} %)",
        ),
    ]
    rows = [(f"{name} per rank", ", ".join(show(r) for r in ranks)) for name, _, show in each]
    measured, planned = max(r["peak_memory_bytes"] for r in ranks), summary["planned_bytes_per_rank"]
    rows[0] = (rows[0][0], f"{rows[0][1]} ({summary['memory_kind']})")
    # what is measured on a CPU is the whole process, on an accelerator its tensors alone
    process = 0 if summary["memory_kind"] == "max_memory_allocated" else summary["process_bytes"]
    more = f" + {megabytes(process)} for Python and its libraries" if process else ""
    share = f": {100 * (planned + process) / measured:.0f} % of the largest measured" if measured else ""
    rows.insert(1, ("planned peak per rank", f"{megabytes(planned)} of tensors{more}{share}"))
    return rows
