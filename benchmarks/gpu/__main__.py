"""Fill the table of a GPU: `python -m benchmarks.gpu [PART ...]` (make bench-gpu ARGS="PART ...").

Parts, in order: ``tests`` (tests/gpu and digests), ``llama8b``, ``memory``, ``peers``, ``moe``, ``dense32b``,
``mistral7b``, ``cards``. Each takes at most ``--limit`` seconds and writes ``gpu_PART.json`` after every row, because
time on a lent device may end at any moment; ``gpu.md`` is merged from all files that are there. ``--small`` tries every
part with tiny models, on a CPU too; its figures go to a folder of their own (``--out``).

Exit codes: 0 done (rows that failed say so), 2 there is no device, or no folder for figures of a dry run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.facts import Facts, facts
from benchmarks.gpu.parts import PARTS, SHORTEST, TOO_LATE, Job, Row
from benchmarks.gpu.report import part_file, write_report

RESULTS = Path(__file__).resolve().parents[1] / "results"
LIMIT = 540


def run_part(name: str, here: Facts, options: argparse.Namespace) -> None:
    """Run a part; write its rows so far after each."""
    started = time.monotonic()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        job = Job(
            here, Path(scratch), started + options.limit, options.small, options.rounds, options.steps,
            options.packages,
        )  # fmt: skip
        for way, measured in PARTS[name](job):
            if options.ways and way not in options.ways:
                continue
            row = rows.setdefault(way, {"way": way})
            if job.left >= SHORTEST:
                row |= measured()
            elif len(row) == 1:
                row["failed"] = TOO_LATE
            done = {"part": name, "small": options.small, "limit": options.limit, "facts": here}
            done |= {"seconds": time.monotonic() - started, "rows": list(rows.values())}
            _write(part_file(options.out, name), done)
            print(f"{name}: {way}: {row.get('failed') or _brief(row)}", file=sys.stderr, flush=True)


def _brief(row: Row) -> str:
    return f"{row['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in row else "done"


def _write(file: Path, content: dict[str, Any]) -> None:
    """Replace the file in one go: what is there is always whole."""
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(file)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for, then write the table of all that is there; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}, or report alone (default: all)")
    parser.add_argument("--small", action="store_true", help="tiny models: a dry run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of each part (default 540)")
    parser.add_argument("--ways", nargs="*", help="only these ways, by name")
    parser.add_argument("--packages", type=Path, help="folder (pip --target) of packages that only peers see")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files and gpu.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys() - {"report"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.small and options.out.resolve() == RESULTS:
        parser.error("--small: its figures are no GPU's; give a folder for them with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.parts != ["report"]:
        here = facts()
        if here["accelerator"] is None and not options.small:
            parser.error("torch finds no accelerator here; --small --out FOLDER is a dry run on the CPU")
        for name in PARTS:
            if name in (options.parts or PARTS):
                run_part(name, here, options)
    print(write_report(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
