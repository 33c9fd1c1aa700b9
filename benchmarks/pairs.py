"""Two ways to train, stepped by turns: each pair of turns gives one ratio.

Reported are the median over the pairs and its 95 % interval by order statistics: of 9 pairs, the 2nd to the 8th.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ranks import Way, machine
from benchmarks.step_spec import Spec

PAIRS = 9


@dataclass(frozen=True)
class Side:
    """One of two ways that are compared."""

    name: str
    spec: Spec
    code: Path | None = None
    """Checkout to run; None = this one."""


@dataclass(frozen=True)
class Comparison:
    """Two ways on the same number of ranks, and the least ratio of their speeds that is aimed at, if one is."""

    num_ranks: int
    ours: Side
    other: Side
    aim: float | None


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and its interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Iterable[float], below: Iterable[float]) -> Ratio:
        """Return the ratio of each pair's two values."""
        ratios = sorted(a / b for a, b in zip(above, below, strict=True))
        return cls(statistics.median(ratios), ratios[1], ratios[-2])

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def measure(comparison: Comparison, logs: Path) -> dict[str, Any]:
    """Run the pairs of turns; return the ratio of tokens/s and both medians of seconds a step."""
    sides = {side.name: side for side in (comparison.ours, comparison.other)}
    ways = {name: Way(side.spec, comparison.num_ranks, logs, code=side.code) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(PAIRS):
        for name in list(ways) if pair % 2 else reversed(ways):  # neither is always the first
            seconds[name].append(max(answer["seconds"] for answer in ways[name].steps(1)))
        print(f"pair {pair + 1} of {PAIRS}", file=sys.stderr, flush=True)
    for way in ways.values():
        way.close()
    mine, theirs = (seconds[side.name] for side in (comparison.ours, comparison.other))
    ratio = Ratio.of(theirs, mine)
    return {
        "ranks": comparison.num_ranks, "way": comparison.ours.name, "other": comparison.other.name,
        "aim": comparison.aim, "ratio": ratio.median, "low": ratio.low, "high": ratio.high,
        "seconds": statistics.median(mine), "other_seconds": statistics.median(theirs),
    }  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the comparisons as a table."""
    lines = [
        "| ranks | tokens/s of | over those of | ratio (95 % interval) | aimed at | seconds a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        reached = "" if row["aim"] is None or row["ratio"] >= row["aim"] else ", **missed**"
        lines.append(
            f"| {row['ranks']} | {row['way']} | {row['other']} | {Ratio(row['ratio'], row['low'], row['high'])} "
            f"| {row['aim'] or ''}{reached} | {row['seconds']:.2f} and {row['other_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def measured_on(found: dict[str, Any]) -> str:
    """Return the line that says when, on what and with which versions something was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['date']}, {found['cores']} cores of {found['device']}; {versions}."


def run(
    name: str, title: str, how: str, parser: argparse.ArgumentParser,
    comparisons: Callable[[Path, argparse.Namespace], Iterable[Comparison]],
) -> None:  # fmt: skip
    """Measure what ``comparisons`` yields; write ``NAME.json`` and ``NAME.md`` after each.

    Args:
        name: of the files.
        title: of the page.
        how: a sentence of the page, formatted with ``length``.
        parser: with further options; those of all comparisons are added.
        comparisons: given a scratch folder and the options.
    """
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    found: dict[str, Any] = {**machine(), "length": options.length, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        for comparison in comparisons(Path(scratch), options):
            found["rows"].append(measure(comparison, Path(scratch)))
            page = f"# {title}\n\nMeasured by `python -m benchmarks.{name}`; its docstring says how. "
            page += f"{how.format(length=options.length)}\n\n{measured_on(found)}\n\n{table(found['rows'])}"
            (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            (options.out / f"{name}.md").write_text(page)
    print(page)
