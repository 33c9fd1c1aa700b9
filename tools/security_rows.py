"""Which test holds which row of the list of attacks (S) and faults (R); `python -m tools.security_rows` writes it.

A test, or a whole module of tests, names its rows at the beginning of its docstring: ``"S7, R13: what is so now."``
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/security.md"
ATTACKS, FAULTS = 24, 18
BEGIN, END = "<!-- written by tools/security_rows.py -->\n", "<!-- end -->\n"
_NAMED = re.compile(r"((?:[SR]\d+(?:, | and )?)+)(?: again)?:")


def rows() -> list[str]:
    """Return the names of all rows."""
    return [f"S{number}" for number in range(1, ATTACKS + 1)] + [f"R{number}" for number in range(1, FAULTS + 1)]


def found() -> dict[str, list[str]]:
    """Return the tests of each row, as pytest names them; a module that names a row stands for all its tests."""
    tests: dict[str, list[str]] = defaultdict(list)
    for file in sorted((ROOT / "tests").glob("*/test_*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        place = str(file.relative_to(ROOT))
        whole: set[str] = set()
        for node in (module, *module.body):
            if isinstance(node, ast.Module | ast.FunctionDef) and (
                named := _NAMED.match(ast.get_docstring(node) or "")
            ):
                name = place if isinstance(node, ast.Module) else f"{place}::{node.name}"
                of_this = set(re.findall(r"[SR]\d+", named[1])) - whole
                whole |= of_this if isinstance(node, ast.Module) else set()
                for row in of_this:
                    tests[row].append(name)
    return tests


def table() -> str:
    """Return the table of the document."""
    tests = found()
    lines = ["| row | tests |", "|---|---|"]
    for row in rows():
        listed = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in tests[row]) if tests[row] else "none"
        lines.append(f"| {row} | {listed} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Put the table between its marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    write()
