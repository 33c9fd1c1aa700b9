"""Walks variants and prints one JSON object for each: ``python -m tests.fake_cuda FOLDER [NAME ...]``."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path

from tests.fake_cuda.guard import build_guard, load_guard


def main() -> int:
    """Walk the named variants, or all; models and the guard are kept in FOLDER. ``all pairs`` is `pairs.all_pairs`."""
    root, *names = sys.argv[1:]
    load_guard(build_guard(Path(root)))  # before torch, which asks for the hooks once

    import torch

    from tests.fake_cuda import triton_kernels
    from tests.fake_cuda.device import install
    from tests.fake_cuda.pairs import ALL_PAIRS, all_pairs
    from tests.fake_cuda.variant import make_folder
    from tests.fake_cuda.variants import VARIANTS
    from tests.fake_cuda.walk import walk

    install()  # after the libraries, which would load kernels for a GPU that they see
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    chosen = {name: VARIANTS[name] for name in names or VARIANTS if name != ALL_PAIRS}
    chosen |= all_pairs() if ALL_PAIRS in names else {}
    for name, variant in chosen.items():
        if triton_kernels.asked_for(variant.settings) and (missing := triton_kernels.missing()):
            print(json.dumps({"name": name, "skipped": f"{' and '.join(missing)} not installed"}), flush=True)
            continue
        try:
            found = walk(make_folder(Path(root), variant.family), variant)
            result = {
                "launches": found.launches, "syncs": found.syncs, "copies": found.copies, "unwaited": found.unwaited,
                "gathered": found.gathered, "races": found.order.races, "arrived": found.order.arrived,
                "ended": found.ended,
            }  # fmt: skip
        except Exception as error:
            lines = str(error).splitlines() or [""]
            where = "".join(traceback.format_tb(error.__traceback__))
            result = {"error": f"{type(error).__name__}: {lines[0][:300]}", "traceback": where}
        print(json.dumps({"name": name, **result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
