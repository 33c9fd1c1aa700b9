"""Does keeping whole copies pay, and what does one rank cost? `python -m benchmarks.layouts [--before FOLDER]`.

Each comparison starts both ways once and steps them by turns on the same rows (`benchmarks.pairs`). FOLDER is a
checkout of an older commit, for comparing a step with what it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pairs import Comparison, Side, run
from benchmarks.step_rows import write_rows
from benchmarks.step_spec import Spec
from fsdp_qlora.files.home import cache_folder


def comparisons(scratch: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Yield what is compared."""
    model, rows = str(cache_folder() / "embedded" / "smollm2-135m-instruct"), scratch / "rows.json"
    write_rows(rows, options.length)

    def spec(way: str, dense: str = "auto", **fsdp: int) -> Spec:
        overrides = {"train": {"compile": "false"}, "fsdp": dict(fsdp), "quant": {"cache_dequantized": dense}}
        return Spec(way, model, str(rows), overrides=overrides)

    copies = Side("a copy on each rank (`fsdp.shard_degree=1`)", spec("ours", shard_degree=1, replicate_degree=2))
    yield Comparison(2, copies, Side("sharded over both", spec("ours", shard_degree=2)), 1.05)
    one = Side("one rank", spec("ours"))
    yield Comparison(1, one, Side("a ten-line loop over the same layers", spec("loop")), 0.98)
    again, kept = "two ranks, layers dequantized again in backward", "two ranks, dense weights kept until then"
    yield Comparison(2, Side(again, spec("ours", "false")), Side(kept, spec("ours", "true")), 0.95)
    if options.before is not None:
        yield Comparison(1, one, Side("one rank, the older commit", spec("ours"), options.before), 1.0)
        yield Comparison(
            2, Side("two ranks", spec("ours")), Side("two ranks, the older commit", spec("ours"), options.before), 0.95
        )


def main() -> None:
    """Measure, and write ``layouts.json`` and ``layouts.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of an older commit")
    how = "SmolLM2-135M, rows of {length} tokens, one a rank and step, not compiled."
    run("layouts", "Layouts", how, parser, comparisons)


if __name__ == "__main__":
    main()
