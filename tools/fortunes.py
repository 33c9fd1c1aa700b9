"""Debian's fortunes, some 15,000 short texts in files named by their topics, for `test_real_topics.py`.

`python -m tools.fortunes` fetches the package once (1.3 MB) and takes it apart with dpkg-deb. None of it is committed.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import tempfile
import urllib.request
from pathlib import Path

from fsdp_qlora.files.home import cache_folder

FORTUNES = cache_folder() / "test-data" / "fortunes"
SOURCE = "http://deb.debian.org/debian/pool/main/f/fortune-mod/fortunes_1.99.1-7.3_all.deb"
SHA256 = "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5"
TOPICS = (
    "computers", "definitions", "food", "kids", "law", "linux", "love", "medicine", "politics", "science",
    "songs-poems", "startrek", "work",
)  # fmt: skip
"""Files with a topic of their own, and enough texts."""
LENGTHS = range(40, 400)
"""Characters of a text that is taken."""


def fetch(target: Path) -> None:
    """Download the package, check it, and move its texts to ``target``."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "fortunes.deb"
        with urllib.request.urlopen(SOURCE, timeout=60) as answer:
            package.write_bytes(answer.read())
        assert hashlib.sha256(package.read_bytes()).hexdigest() == SHA256, "not the package that was checked"
        subprocess.run(["dpkg-deb", "-x", package, f"{scratch}/made"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (Path(scratch) / "made/usr/share/games/fortunes").rename(target)


def write_topics(folder: Path, num_train: int, num_held: int) -> tuple[Path, Path]:
    """Write rows with a text and its topic; return the files of training and held-out rows, always the same."""
    rows = [
        {"text": text, "label": topic}
        for topic in TOPICS
        for text in sorted({part.strip() for part in (FORTUNES / topic).read_text(encoding="utf-8").split("\n%\n")})
        if len(text) in LENGTHS
    ]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True)
    files = folder / "train.jsonl", folder / "held.jsonl"
    for file, some in zip(files, (rows[num_held : num_held + num_train], rows[:num_held]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return files


if __name__ == "__main__":
    if not FORTUNES.is_dir():
        fetch(FORTUNES)
    print(FORTUNES)
