"""Runs the studies: `python -m benchmarks.studies [--minutes 9] [--only formats,methods] [--report]`.

Units that results already hold are skipped, so a part of nine minutes goes on where the last one ended; a unit that is
under way is finished. Results are merged into docs/studies/results.json after each, and the pages are drawn anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ranks import machine
from benchmarks.studies.page import write_page
from benchmarks.studies.questions import STUDIES, Unit, units
from benchmarks.studies.rows import write_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "studies"


def main() -> int:
    """Run what is missing for so many minutes; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no unit after these")
    parser.add_argument("--only", default=",".join(study.name for study in STUDIES), help="studies, by name")
    parser.add_argument("--report", action="store_true", help="only draw the pages anew")
    asked = parser.parse_args()
    PAGE.mkdir(parents=True, exist_ok=True)
    file, started = PAGE / "results.json", time.monotonic()
    for unit in [] if asked.report else units(asked.only.split(",")):
        if unit.name in _results(file):
            continue
        if time.monotonic() - started > 60 * asked.minutes:
            break
        print(f"{unit.name} ...", flush=True)
        try:
            measured = _run(unit)
        except RuntimeError as error:  # the others go on; it is missing, and tried again the next time
            print(error, flush=True)
            continue
        merged = _results(file) | {unit.name: measured}  # another process may run other studies
        file.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    results = _results(file)
    write_page(PAGE, results)
    left = [unit.name for unit in units([study.name for study in STUDIES]) if unit.name not in results]
    print(f"{len(results)} units are there, {len(left)} are missing; see {PAGE / 'README.md'}")
    return 0


def _results(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _run(unit: Unit) -> dict[str, Any]:
    """Train a unit in a process of its own; return what it measured, and on what.

    Raises:
        RuntimeError: if it failed, with what it printed last.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch))
        command = [sys.executable, "-m", "benchmarks.studies.unit", scratch, f"run.seed={unit.seed}", *unit.overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{unit.name}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        measured = json.loads(done.stdout.splitlines()[-1])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    where = {key: machine()[key] for key in ("device", "date")}
    return measured | {"commit": commit.stdout.strip(), **where}


if __name__ == "__main__":
    sys.exit(main())
