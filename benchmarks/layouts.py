"""Does keeping whole copies pay, and what does one rank cost? `python -m benchmarks.layouts [--before FOLDER]`.

Each comparison starts both ways once and steps them by turns on the same rows (`benchmarks.step`). A pair of turns
gives one ratio. Reported are the median over the pairs and its 95 % interval by order statistics: of 9 pairs, the 2nd
to the 8th. FOLDER is a checkout of an older commit, for comparing a step with what it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ranks import Way, machine
from benchmarks.step_rows import write_rows
from benchmarks.step_spec import Spec
from fsdp_qlora.files.home import cache_folder

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
    """Two ways on the same number of ranks, and the least ratio of their speeds that is aimed at."""

    num_ranks: int
    ours: Side
    other: Side
    aim: float


def comparisons(rows: Path, before: Path | None) -> Iterator[Comparison]:
    """Yield what is compared."""
    model = str(cache_folder() / "embedded" / "smollm2-135m-instruct")

    def spec(way: str, **fsdp: int) -> Spec:
        return Spec(way, model, str(rows), overrides={"train": {"compile": "false"}, "fsdp": dict(fsdp)})

    copies = Side("a copy on each rank (`fsdp.shard_degree=1`)", spec("ours", shard_degree=1, replicate_degree=2))
    yield Comparison(2, copies, Side("sharded over both", spec("ours", shard_degree=2)), 1.05)
    one = Side("one rank", spec("ours"))
    yield Comparison(1, one, Side("a ten-line loop over the same layers", spec("loop")), 0.98)
    if before is not None:
        yield Comparison(1, one, Side("one rank, the older commit", spec("ours"), before), 1.0)
        yield Comparison(
            2, Side("two ranks", spec("ours")), Side("two ranks, the older commit", spec("ours"), before), 0.95
        )


def measure(comparison: Comparison, logs: Path) -> dict[str, Any]:
    """Run the pairs of turns; return the ratios of tokens/s and both medians of seconds a step."""
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
    ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    return {
        "ranks": comparison.num_ranks, "way": comparison.ours.name, "other": comparison.other.name,
        "aim": comparison.aim, "ratio": statistics.median(ratios), "low": ratios[1], "high": ratios[-2],
        "seconds": statistics.median(mine), "other_seconds": statistics.median(theirs),
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Layouts",
        "",
        "Measured by `python -m benchmarks.layouts`; its docstring says how. SmolLM2-135M, rows of "
        f"{found['length']} tokens, one a rank and step, not compiled.",
        "",
        f"{found['date']}, {found['cores']} cores of {found['device']}; {versions}.",
        "",
        "| ranks | tokens/s of | over those of | ratio (95 % interval) | aimed at | seconds a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        reached = "" if row["ratio"] >= row["aim"] else ", **missed**"
        lines.append(
            f"| {row['ranks']} | {row['way']} | {row['other']} | {row['ratio']:.3f} ({row['low']:.3f} to "
            f"{row['high']:.3f}) | {row['aim']}{reached} | {row['seconds']:.2f} and {row['other_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write ``layouts.json`` and ``layouts.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of an older commit")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    found: dict[str, Any] = {**machine(), "length": options.length, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.json"
        write_rows(rows, options.length)
        for comparison in comparisons(rows, options.before):
            found["rows"].append(measure(comparison, Path(scratch)))
            (options.out / "layouts.json").write_text(json.dumps(found, indent=1) + "\n")
            (options.out / "layouts.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
