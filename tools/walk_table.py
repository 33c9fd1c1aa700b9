"""Two outputs of ``python -m tests.fake_cuda`` -> docs/walks.md: what a step asks of its device, before and after.

``python -m tools.walk_table BEFORE AFTER WHAT``; WHAT names the two in a sentence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "walks.md"
STEP = "step 3"


def _read(file: str) -> dict[str, Any]:
    return {line["name"]: line for line in map(json.loads, Path(file).read_text().splitlines())}


def _count(walk: Any, kind: str) -> str:
    if walk is None or "error" in walk:
        return "not walked"
    value = walk.get(kind, {}).get(STEP, 0)
    if kind == "arrived":
        return f"{value.get('beside', 0) / 1e6:.2f} of {sum(value.values()) / 1e6:.2f}" if value else "not counted"
    return f"{value / 1e6:.2f}" if kind == "gathered" else str(sum(value.values()) if value else 0)


def main() -> int:
    """Write the page."""
    before, after = _read(sys.argv[1]), _read(sys.argv[2])
    lines = [
        "# What a step asks of its device",
        "",
        f"Written by `tools/walk_table.py`: {sys.argv[3]}",
        "",
        "A step of a small Llama (2 layers of width 256, 2 micro-batches, 48 tokens a row; Mixtral with 4 experts) on",
        "the fake CUDA device of `tests/fake_cuda`, after the optimizer's state exists. *Waits*: how often the host",
        "waits for the device. *Launches*: operations that start work there. *Gathered*: MB of all gathered units.",
        "*Copied ahead*: MB copied from host memory beside other work, of all that are copied from there. No time is",
        "measured here. docs/numerics.md says which waits are left and why.",
        "",
        "| variant | waits | launches | gathered MB | copied ahead, MB |",
        "|---|---|---|---|---|",
    ]
    kinds = ("syncs", "launches", "gathered", "arrived")
    for name in (name for name in after if not name.startswith("planted")):
        cells = [f"{_count(before.get(name), kind)} -> {_count(after[name], kind)}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    PAGE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
