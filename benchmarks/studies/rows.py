"""The rows of the studies, from the embedded data: tasks to learn, the same kind held out, and text unlike them.

Each set is there twice: as chats or texts for a language model, and as pairs for a model of embeddings, which is to
find the answer to a task, and the piece of an article that follows another one.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

from fsdp_qlora.files.home import cache_folder

CHATS, PAIRS = "chats", "pairs"
"""Folders of the sets."""
TRAIN, HELD_OUT, UNRELATED, ELSEWHERE = "train.jsonl", "held_out.jsonl", "unrelated.jsonl", "elsewhere.jsonl"
NUM_TRAIN, NUM_HELD_OUT, NUM_UNRELATED = 900, 64, 48
_CHARACTERS = 500
"""Of a piece of the encyclopedia."""


def write_rows(folder: Path) -> None:
    """Write the files of rows; the same ones every time."""
    source = cache_folder() / "embedded"
    tasks = _read(source / "alpaca_en_demo.jsonl")
    random.Random(0).shuffle(tasks)
    articles = [
        [
            line[start : start + _CHARACTERS]
            for start in range(0, min(len(line), 4 * _CHARACTERS) - _CHARACTERS, _CHARACTERS)
        ]
        for line in (source / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    ]
    pieces = [{"text": piece} for article in articles for piece in article]
    following = [{"anchor": a, "positive": b} for article in articles for a, b in pairwise(article)]
    identity = _read(source / "identity.jsonl")[:NUM_UNRELATED]
    train, held_out = tasks[:NUM_TRAIN], tasks[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT]
    _write(folder / CHATS, {
        TRAIN: train, HELD_OUT: held_out, UNRELATED: pieces[:NUM_UNRELATED], ELSEWHERE: identity,
    })  # fmt: skip
    _write(folder / PAIRS, {
        TRAIN: _pairs(train), HELD_OUT: _pairs(held_out), UNRELATED: following[:NUM_UNRELATED],
        ELSEWHERE: _pairs(identity),
    })  # fmt: skip


def _read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(folder: Path, sets: dict[str, list[dict[str, str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pairs(tasks: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        {"anchor": f"{row['instruction']} {row['input']}".strip(), "positive": row["output"]}
        for row in tasks if row["output"].strip()
    ]  # fmt: skip
