"""How fast is a step if every token is supervised? `python -m benchmarks.supervised`.

Then the head and its softmax weigh most, which nothing of ours makes faster than in peers. Two ranks, by turns
(`benchmarks.pairs`): compiled layers and replicated adapters, beside TRL's SFTTrainer, the same uncompiled, the same
with few losses, and the matrix products alone, which nobody can go below.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pairs import Comparison, Side, run
from benchmarks.step import FAST
from benchmarks.step_rows import write_rows
from benchmarks.step_spec import Spec
from fsdp_qlora.files.home import cache_folder


def comparisons(scratch: Path, options: argparse.Namespace) -> Iterator[Comparison]:
    """Yield what is compared."""
    model = str(cache_folder() / "embedded" / "smollm2-135m-instruct")
    every, few = scratch / "every.json", scratch / "few.json"
    write_rows(every, options.length, supervised=lambda place: True)
    write_rows(few, options.length, supervised=lambda place: place % 64 == 0)
    ours = Side("ours", Spec("ours", model, str(every), overrides=FAST))
    yield Comparison(2, ours, Side("TRL", Spec("trl", model, str(every))), 1.7)
    plain = Spec("ours", model, str(every), overrides={**FAST, "train": {"compile": "false"}})
    yield Comparison(2, ours, Side("ours, not compiled", plain), 1.0)
    yield Comparison(2, ours, Side("matrix products alone", Spec("roofline", model, str(every))), None)
    yield Comparison(
        2, ours, Side("ours, one token of 64 supervised", Spec("ours", model, str(few), overrides=FAST)), None
    )


def main() -> None:
    """Measure, and write ``supervised.json`` and ``supervised.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = "SmolLM2-135M, rows of {length} tokens, one a rank and step, every token supervised, layers compiled."
    run("supervised", "Every token supervised", how, parser, comparisons)


if __name__ == "__main__":
    main()
