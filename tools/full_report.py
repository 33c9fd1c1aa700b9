"""build/test-full.xml -> docs/test-full.md: the last result of `make test-full`, with commit, date and machine."""

from __future__ import annotations

import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Write the page; return 1 if a test failed."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    skipped: list[str] = []
    for case in ElementTree.parse(ROOT / "build" / "test-full.xml").getroot().iter("testcase"):
        row = rows[case.attrib["classname"].replace(".", "/") + ".py"]
        failed = case.find("failure") is not None or case.find("error") is not None
        skip = case.find("skipped")
        row[1 if failed else 2 if skip is not None else 0] += 1
        row[3] += float(case.attrib["time"])
        if skip is not None:
            skipped.append(f"- {case.attrib['name']}: {skip.attrib.get('message', '')}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [
        "# The last `make test-full`",
        "",
        f"Commit {commit.stdout.strip()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.machine()}, "
        f"Python {platform.python_version()}, no GPU. Written by `tools/full_report.py`.",
        "",
        "| file | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|",
        *(f"| {name} | {int(p)} | {int(f)} | {int(s)} | {t:.0f} |" for name, (p, f, s, t) in sorted(rows.items())),
    ]
    total = [sum(row[i] for row in rows.values()) for i in range(4)]
    lines.append(f"| **all** | {int(total[0])} | {int(total[1])} | {int(total[2])} | {total[3]:.0f} |")
    (ROOT / "docs" / "test-full.md").write_text(
        "\n".join([*lines, *(["", "Skipped:", "", *skipped] if skipped else [])]) + "\n"
    )
    return 1 if total[1] else 0


if __name__ == "__main__":
    sys.exit(main())
