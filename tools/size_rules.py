"""The size rules of docs/style.md, run by `make lint`: files of at most 400 lines, functions of at most 60, no own
import inside a function, and omegaconf/hydra in cli/ only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fsdp_qlora"
MAX_FILE, MAX_FUNCTION = 400, 60


def problems(file: Path) -> list[str]:
    """Return what ``file`` breaks."""
    text = file.read_text()
    name = file.relative_to(PACKAGE.parent)
    found = [f"{name}: {n} lines, at most {MAX_FILE}"] if (n := len(text.splitlines())) > MAX_FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
            found += [
                f"{name}:{inner.lineno}: own module imported inside {node.name}"
                for inner in ast.walk(node)
                if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("fsdp_qlora")
            ]
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if file.parent.name != "cli" and any(m.split(".")[0] in ("hydra", "omegaconf") for m in modules):
            found.append(f"{name}: only cli/ knows hydra and omegaconf")
        if any(m.split(".")[0] == "pickle" for m in modules):
            found.append(f"{name}: nothing is pickled here")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append(f"{name}:{node.lineno}: torch.load unpickles")
    return found


def main() -> int:
    """Check every file of the package."""
    found = [problem for file in sorted(PACKAGE.rglob("*.py")) for problem in problems(file)]
    print("\n".join(found) or "size rules kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
