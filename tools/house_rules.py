"""The rules of the house that can be counted, run by `make lint`; each stands at 0.

- Size: files of at most 400 lines, functions of at most 60.
- Rooms: what tells one kind from another stays in its room (docs/adr/0012): ``is_int8`` in `quant/formats/`, LoRA's
  tensor names in `adapters/`, what only fine-tuning has in `objectives/`; formats are named by the listed files alone.
  In code: names and texts, docstrings aside.
- No variable is called ``found``: it is called what it holds.
- ``auto`` is compared with where it is decided, and nowhere else.
- Layers: no exception to the import contract, no own module imported inside a function, hydra and omegaconf in `cli/`
  alone, nothing unpickled, no loose module at the root.
- Upstream's private names are used in one module each, and listed (`tools/private_names.py`).
- Examples import what is public and nothing else.
- ruff looks at every file (it skips folders with some names).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.private_names import own_names
from tools.private_names import problems as private_problems

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fsdp_qlora"
MAX_FILE, MAX_FUNCTION = 400, 60
STILL_FOUND = ("checks/gather.py", "load/stream.py", "parallel/shard.py", "run/training.py", "simulate/")
"""Where a variable may still be called ``found``."""
AT_THE_ROOT = {"__init__", "__main__", "errors", "shown", "scopes"}
FORMATS = "(?i)(?<![a-z0-9])(nf4|fp4|int8|blocks4)(?![a-z0-9])"
NAME_FORMATS = (
    "checks/reference.py", "checks/settings.py",  # upstream is the judge
    "cli/plan.py", "config/choices.py", "config/rules.py", "config/schema.py", "config/verb_rules.py",  # what is asked
    "export/quantized_base.py", "load/stored.py",  # bitsandbytes' own files
    "load/safetensors.py",  # a dtype
    "plan/quantized.py", "simulate/step.py",  # llm_int8_threshold
    "quant/embedding.py", "quant/lookup.py",  # advice; nf4's quick way
)  # fmt: skip
"""The files outside `quant/formats/` that name a format."""
ROOMS: dict[str, tuple[str, ...]] = {
    "is_int8": ("quant/formats/",),
    "lora_[AB]": ("adapters/",),
    "num_targets|perplexity": ("objectives/",),
    FORMATS: ("quant/formats/", *NAME_FORMATS),
}
"""What must not be said in code outside a room."""
DECIDES = ("config/auto.py",)
"""Where settings that are ``auto`` become values."""


def size(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield what is too long."""
    if (lines := len(file.read_text().splitlines())) > MAX_FILE:
        yield f"{lines} lines, at most {MAX_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def imports(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield imports that are late, private, or of what only one folder may know."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("fsdp_qlora"):
                    yield f"{inner.lineno}: own module imported inside {node.name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fsdp_qlora"):
            private = [a.name for a in node.names if a.name.startswith("_")]
            yield from (f"{node.lineno}: {name} is private to {node.module}" for name in private)
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if file.parent.name != "cli" and any(m.split(".")[0] in ("hydra", "omegaconf") for m in modules):
            yield "only cli/ knows hydra and omegaconf"
        if any(m.split(".")[0] == "pickle" for m in modules):
            yield "nothing is pickled here"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield f"{node.lineno}: torch.load unpickles"


def _docstrings(tree: ast.Module) -> set[int]:
    """Return the ids of texts that document something: a statement of nothing but a text."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every name and every text that is no docstring."""
    documents = _docstrings(tree)
    for node in ast.walk(tree):
        for name in ("id", "attr", "arg", "name"):
            if isinstance(text := getattr(node, name, None), str):
                yield getattr(node, "lineno", 0), text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value


def names(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield variables whose name does not say what they hold."""
    if str(file.relative_to(PACKAGE)).startswith(STILL_FOUND):
        return
    for node in ast.walk(tree):
        bound = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
        bound += [node.arg] if isinstance(node, ast.arg) else []
        bound += [node.name] if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) else []
        if "found" in bound:
            yield f"{node.lineno}: found is no name for a variable: call it what it holds"


def rooms(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield what belongs to another room."""
    place = str(file.relative_to(PACKAGE))
    for pattern, room in ROOMS.items():
        if not place.startswith(room):
            for line, text in _words(tree):
                if re.search(pattern, text):
                    yield f"{line}: {text!r} belongs to {room[0]}"


def undecided(file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield comparisons with ``auto`` outside of where it is decided."""
    if str(file.relative_to(PACKAGE)) in DECIDES:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            inside = [x for side in (node.left, *node.comparators) for x in ast.walk(side)]
            if any(isinstance(x, ast.Constant) and x.value == "auto" for x in inside):
                yield f"{node.lineno}: {ast.unparse(node)}: decided elsewhere"


def the_whole() -> Iterator[str]:
    """Yield what is wrong with the tree as a whole."""
    for file in sorted(PACKAGE.glob("*.py")):
        if file.stem not in AT_THE_ROOT:
            yield f"{file.name}: no loose module at the root"
    for file in sorted((ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fsdp_qlora."):
                yield f"{file.relative_to(ROOT)}: imports {node.module}, which is not public"
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if any(contract.get("ignore_imports") for contract in contracts):
        yield "pyproject.toml: the import contract has exceptions"
    ruff = Path(sys.executable).with_name("ruff")
    shown = subprocess.run([ruff, "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    seen = {Path(line) for line in shown.stdout.splitlines()}
    yield from (f"{f.relative_to(ROOT)}: ruff does not look at it" for f in PACKAGE.rglob("*.py") if f not in seen)


def needless(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Yield exceptions that nothing needs any more."""
    for place in NAME_FORMATS:
        tree = trees.get(PACKAGE / place, ast.Module([], []))
        if not any(re.search(FORMATS, text) for _, text in _words(tree)):
            yield f"NAME_FORMATS: {place} names no format any more"


def problems() -> list[str]:
    """Return everything that breaks a rule."""
    broken = list(the_whole())
    trees = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    broken += needless(trees)
    own = own_names(list(trees.values()))
    for file, tree in trees.items():
        for rule in (size, imports, names, rooms, undecided):
            broken += [f"{file.relative_to(ROOT)}: {problem}" for problem in rule(file, tree)]
        private = private_problems(str(file.relative_to(PACKAGE)), tree, own)
        broken += [f"{file.relative_to(ROOT)}: {problem}" for problem in private]
    return broken


def main() -> int:
    """Check the package."""
    broken = problems()
    print("\n".join(broken) or "the rules of the house are kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
