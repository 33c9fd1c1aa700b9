"""results.json -> docs/studies/README.md and a plot for each study. Intervals are paired bootstraps over rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.questions import SEEDS, STUDIES, Study

_DRAWS = 2000
_SETS = {"held_out": "held out", "unrelated": "encyclopedia (forgetting)", "elsewhere": "other tasks"}
Rows = Sequence[Sequence[float]]
WARNING = """SmolLM2-135M-Instruct is as a package ships it: its weights are dequantized Q4_1, not originals. So what
stands here of its base formats understates what quantizing the original weights costs: some of it is lost already. The
studies of MiniLM, whose float32 weights are the originals, stand beside it for that reason. Small models on two CPU
cores say little of large ones; the tables say what was measured, no more."""


def mean(rows: Rows) -> float:
    """Return the loss per token of ``[(sum, tokens), ...]``."""
    total = np.asarray(rows, dtype=np.float64).sum(0)
    return float(total[0] / total[1])


def difference(ours: Sequence[Rows], theirs: Sequence[Rows], draws: int = _DRAWS) -> tuple[float, float, float]:
    """Return the mean difference of two losses per token and its 95 % interval.

    Rows are drawn with replacement, the same ones for both sides and for all seeds (Efron and Tibshirani, 1993).

    Args:
        ours: for each seed, the rows.
        theirs: the same rows under the other variant.
        draws: number of draws.
    """
    pairs = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in zip(ours, theirs, strict=True)
    ]
    random, count = np.random.default_rng(0), len(pairs[0][0])
    chosen = random.integers(0, count, (draws, count))

    def gap(index: np.ndarray) -> np.ndarray:
        sums = [[side[index].sum(-2) for side in pair] for pair in pairs]
        return np.mean([a[..., 0] / a[..., 1] - b[..., 0] / b[..., 1] for a, b in sums], axis=0)

    low, high = np.quantile(gap(chosen), [0.025, 0.975])
    return float(gap(np.arange(count))), float(low), float(high)


def write_page(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page and the plots."""
    lines = ["# Studies", "", WARNING, ""]
    machines = sorted({f"{one['device']}, {one['date']}, commit {one['commit']}" for one in results.values()})
    lines += ["`make studies` runs what is missing, nine minutes at a time, and draws this page from results.json.", ""]
    lines += [f"Measured on: {'; '.join(machines)}.", ""] if machines else []
    lines += [
        "Losses are nats per supervised token, for MiniLM nats per row: the cross entropy of a row's second text among "
        "those of all rows. Differences are to the variant named in the table's head, with 95 % "
        "intervals by a paired bootstrap over rows. A row with fewer seeds than asked for says so.", "",
    ]  # fmt: skip
    for study in STUDIES:
        lines += [*_study(study, results, folder), ""]
    (folder / "README.md").write_text("\n".join(lines))


def _of(study: Study, variant: str, results: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the units of a variant that there are, by seed."""
    names = [f"{study.name}/{variant}/{seed}" for seed in study.seeds]
    return [results[name] for name in names if name in results]


def _study(study: Study, results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    head = [f"## {study.name}", "", f"{study.question} Base: {study.base}.", ""]
    there = {variant: _of(study, variant, results) for variant in study.variants}
    if not there[study.reference]:
        return [*head, "Not run yet."]
    columns = [
        "variant",
        "held out, before",
        "after",
        f"to {study.reference}",
        "forgotten",
        "other tasks",
        "trained",
        "file",
    ]
    lines = [*head, f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for variant, units in there.items():
        if units:
            lines.append("| " + " | ".join(_row(study, variant, units, there[study.reference])) + " |")
    _plot(study, {name: units for name, units in there.items() if units}, folder / f"{study.name}.svg")
    return [*lines, "", f"![held-out loss after training, {study.name}]({study.name}.svg)"]


def _row(
    study: Study, variant: str, units: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> list[str]:
    few = f" ({len(units)} of {len(study.seeds)} seeds)" if len(units) < len(study.seeds) else ""
    before, after = (np.mean([mean(unit[when]["held_out"]) for unit in units]) for when in ("before", "after"))
    paired = list(zip(units, reference, strict=False))
    gap = difference([a["after"]["held_out"] for a, _ in paired], [b["after"]["held_out"] for _, b in paired])
    forgotten, elsewhere = (
        difference([unit["after"][name] for unit in units], [unit["before"][name] for unit in units])
        for name in ("unrelated", "elsewhere")
    )
    one = units[0]
    return [
        variant + few, f"{before:.4f}", f"{after:.4f}", "-" if variant == study.reference else _shown(gap),
        _shown(forgotten), _shown(elsewhere), f"{one['trainable_parameters'] / 1e6:.2f} M",
        f"{one['adapter_bytes'] / 1e6:.1f} MB",
    ]  # fmt: skip


def _shown(gap: tuple[float, float, float]) -> str:
    return f"{gap[0]:+.4f} ({gap[1]:+.4f} to {gap[2]:+.4f})"


def _plot(study: Study, there: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
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
