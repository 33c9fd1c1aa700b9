"""The rows of the studies, from the embedded data: tasks to learn, the same kind held out, and text unlike them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fsdp_qlora.files.home import cache_folder

TRAIN, HELD_OUT, UNRELATED, ELSEWHERE = "train.jsonl", "held_out.jsonl", "unrelated.jsonl", "elsewhere.jsonl"
NUM_TRAIN, NUM_HELD_OUT, NUM_UNRELATED = 900, 64, 48
_CHARACTERS = 500
"""Of a piece of the encyclopedia."""


def write_rows(folder: Path) -> None:
    """Write the files of rows; the same ones every time."""
    source = cache_folder() / "embedded"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = (source / "alpaca_en_demo.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(tasks)
    pieces = [
        json.dumps({"text": line[start : start + _CHARACTERS]})
        for line in (source / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
        for start in range(0, min(len(line), 4 * _CHARACTERS) - _CHARACTERS, _CHARACTERS)
    ]
    identity = (source / "identity.jsonl").read_text(encoding="utf-8").splitlines()
    for name, lines in {
        TRAIN: tasks[:NUM_TRAIN],
        HELD_OUT: tasks[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT],
        UNRELATED: pieces[:NUM_UNRELATED],
        ELSEWHERE: identity[:NUM_UNRELATED],
    }.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
