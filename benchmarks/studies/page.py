"""results.json -> docs/studies/README.md and a plot for each study. Intervals are paired bootstraps over rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.claims import HEAD, MARGIN, Results, promises
from benchmarks.studies.compare import Gap, difference, mean
from benchmarks.studies.questions import SEEDS, STUDIES, Study, units_of

Units = Sequence[Mapping[str, Any]]
"""A variant's units, by seed."""
WARNING = """SmolLM2-135M-Instruct is as a package ships it: its weights are dequantized Q4_1, not originals. So what
stands here of its base formats understates what quantizing the original weights costs: some of it is lost already. The
studies of MiniLM, whose float32 weights are the originals, stand beside it for that reason. Small models on two CPU
cores say little of large ones; the tables say what was measured, no more."""


def write_page(folder: Path, results: Results) -> None:
    """Write the page and the plots."""
    lines = ["# Studies", "", WARNING, ""]
    machines = sorted({f"{one['device']}, {one['date']}, commit {one['commit']}" for one in results.values()})
    lines += ["`make studies` runs what is missing, nine minutes at a time, and draws this page from results.json.", ""]
    lines += [f"Measured on: {'; '.join(machines)}.", ""] if machines else []
    lines += [
        "Losses are nats per supervised token, for MiniLM nats per row: the cross entropy of a row's second text among "
        "those of all rows. Differences are to the variant named in the table's head, with 95 % "
        "intervals by a paired bootstrap over rows. A row with fewer seeds than asked for says so. Forgotten is what "
        "training added to the loss on pieces of an encyclopedia, other tasks what it added on questions of another "
        "kind.", "",
    ]  # fmt: skip
    if promised := list(promises(results)):
        lines += ["## What the method promises", "", f"Near: not above it by more than {MARGIN:.0%} of the loss.", ""]
        lines += [*HEAD, *promised, ""]
    for study in STUDIES:
        lines += [*_study(study, results, folder), ""]
    (folder / "README.md").write_text("\n".join(lines))


def _of(study: Study, variant: str, results: Results) -> Units:
    """Return the units of a variant that there are, by seed."""
    return [results[unit.name] for unit in units_of(study, variant) if unit.name in results]


def _study(study: Study, results: Results, folder: Path) -> list[str]:
    head = [f"## {study.name}", "", f"{study.question} Base: {study.base}.", ""]
    there = {variant: units for variant in study.variants if (units := _of(study, variant, results))}
    if study.reference not in there or len(there) == 1:
        return [*head, "Not run yet."]
    _plot(study, there, folder / f"{study.name}.svg")
    learned = [_learned(study, variant, units, there[study.reference]) for variant, units in there.items()]
    against = f"to {study.reference}"
    columns = ["variant", "trained", "exported", "checkpoint", "base, as stored", "planned per rank"]
    cost = [[variant, *_cost(units[0])] for variant, units in there.items()]
    if study.timed:
        columns.append("CPU time")
        cost = [[*row, f"{units[0]['cpu_seconds']:.0f} s"] for row, units in zip(cost, there.values(), strict=True)]
    return [
        *head,
        *_table(["variant", "before", against, "after", against, "forgotten", "other tasks"], learned), "",
        *_table(columns, cost), "", f"![held-out loss after training, {study.name}]({study.name}.svg)",
    ]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _learned(study: Study, variant: str, units: Units, reference: Units) -> list[str]:
    few = f" ({len(units)} of {len(study.seeds)} seeds)" if len(units) < len(study.seeds) else ""
    shown = [variant + few]
    for when in ("before", "after"):
        ours, theirs = ([unit[when]["held_out"] for unit in side] for side in _paired(units, reference))
        gap = "-" if variant == study.reference else _shown(difference(ours, theirs))
        shown += [f"{np.mean([mean(unit[when]['held_out']) for unit in units]):.4f}", gap]
    for name in ("unrelated", "elsewhere"):
        after, before = ([unit[when][name] for unit in units] for when in ("after", "before"))
        shown.append(_shown(difference(after, before)))
    return shown


def _paired(units: Units, reference: Units) -> tuple[Units, Units]:
    """Return both sides with the seeds that both have, which are the first ones."""
    both = min(len(units), len(reference))
    return units[:both], reference[:both]


def _cost(unit: Mapping[str, Any]) -> list[str]:
    sizes = [unit[f"{name}_bytes"] for name in ("adapter", "checkpoint", "quantized")] + [
        unit["planned_bytes_per_rank"]
    ]
    trained = f"{unit['trainable_parameters'] / 1e6:.2f} M"
    return [trained, *(f"{size / 1e6:.1f} MB" for size in sizes)]


def _shown(gap: Gap) -> str:
    return f"{gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f})"


def _plot(study: Study, there: Mapping[str, Units], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = study.name  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.4 * len(there)), layout="constrained")
    for place, units in enumerate(reversed(list(there.values()))):
        for when, marker in (("before", "o"), ("after", "D")):
            values = [mean(unit[when]["held_out"]) for unit in units]
            axes.plot(values, [place] * len(values), marker, color="C0" if when == "after" else "0.6", label=when)
    axes.set_yticks(range(len(there)), reversed(list(there)))
    axes.set_xlabel(f"held-out loss, nats (grey: before training; {len(SEEDS)} seeds at most)")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
