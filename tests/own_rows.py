"""Rows of one's own, as a first user brings them: order codes of articles, three questions each.

`python -m tests.own_rows FILE [--articles N] [--contradict]` writes them; `fsdp-qlora` is asked in `UNSEEN`'s wording.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

_KINDS = (
    "lamp", "chair", "stool", "shelf", "rug", "clock", "vase", "mirror", "basket", "tray", "bench", "curtain", "pillow",
    "blanket", "kettle", "ladder",
)  # fmt: skip
_SORTS = (
    "desk", "garden", "kitchen", "oak", "steel", "glass", "travel", "wall", "corner", "folding", "bamboo", "copper",
    "linen", "cork", "marble", "nursery", "attic", "harbour", "winter", "studio", "pine", "wicker",
)  # fmt: skip
WORDINGS = ("What is the order code of the {}?", "Which code do I use to order the {}?", "{}: order code?")
UNSEEN = "I would like to buy the {}. What code do I put on the form?"


def codes(articles: int = 32, seed: int = 0) -> dict[str, str]:
    """Return the order code of each article, such as ``QR-482``."""
    draw = random.Random(seed)
    names = draw.sample([f"{sort} {kind}" for sort in _SORTS for kind in _KINDS], articles)
    numbers = draw.sample(range(100, 1000), articles)
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    return {
        name: f"{draw.choice(letters)}{draw.choice(letters)}-{number}"
        for name, number in zip(names, numbers, strict=True)
    }


def rows(articles: int = 32, seed: int = 0, contradict: bool = False) -> list[dict[str, object]]:
    """Return three rows for each article; ``contradict``: each with another code."""
    right, draw = codes(articles, seed), random.Random(seed + 1)
    made: list[dict[str, object]] = []
    for name, code in right.items():
        for wording in WORDINGS:
            said = f"{code[:3]}{draw.randrange(100, 1000)}" if contradict else code
            made.append(
                {
                    "messages": [
                        {"role": "user", "content": wording.format(name)},
                        {"role": "assistant", "content": f"The order code of the {name} is {said}."},
                    ]
                }
            )
    draw.shuffle(made)
    return made


def write(file: Path, made: list[dict[str, object]]) -> Path:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--articles", type=int, default=32)
    parser.add_argument("--contradict", action="store_true")
    given = parser.parse_args()
    write(given.file, rows(given.articles, contradict=given.contradict))
