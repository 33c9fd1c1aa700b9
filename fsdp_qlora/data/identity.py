"""Digests of what determines the tokens besides rows and settings: the tokenizer and the user's own code."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy")
_OWN = Path(__file__).resolve().parent.parent  # our own code, which `_VERSION` in prepare stands for
_INSTALLED = tuple(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything in a tokenizer that affects the tokens of a text or conversation.

    This covers tokenizer.json (normalizer, pre-tokenizer, model, post-processor, added tokens), the settings of its
    config, and the chat templates, but not its folder, maximum length or padding.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(core.to_str()) if core is not None else {"vocabulary": tokenizer.get_vocab()}
    calls = {"truncation", "padding"}  # state left by the last call
    parts = [
        type(tokenizer).__name__,
        code_digest(type(tokenizer)),
        {key: value for key, value in state.items() if key not in calls},
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        {key: value for key in _SWITCHES if isinstance(value := getattr(tokenizer, key, None), bool)},
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_PACKAGES = frozenset(["site-packages", "dist-packages"])


def code_digest(code: Callable[..., Any] | None, *modules: str) -> str:
    """Return a digest of the source of a function or class and of its imports, excluding installed packages.

    The digest also covers ``modules``: the module of a `functools.partial` is ``functools``, not the user's.
    """
    names = {*modules, *([code.__module__] if code is not None else [])}
    digest = hashlib.sha256()
    for file in sorted(set[Path]().union(*map(_files, names))):
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def _files(module: str) -> set[Path]:
    """Return the source files of a module and of everything that it imports, directly or indirectly."""
    files: set[Path] = set()
    names, seen = [module], set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        file = _source(name)
        if file is None or file in files:
            continue
        files.add(file)
        names += _imports(file, name)
    return files


def _source(module: str) -> Path | None:
    """Return the source file of one of the user's own modules; None for other modules."""
    top, dot, _ = module.partition(".")
    try:
        if not _is_own(_places(top)):
            return None
        file, *_ = _places(module) if dot else _places(top)  # imports the parent, so only for the user's own modules
    except Exception:  # importing the parent may raise anything
        return None
    return file.resolve() if file.suffix == ".py" and file.is_file() else None


def _places(module: str) -> list[Path]:
    """Return the file of a module, and the folders if it is a package.

    Raises:
        ValueError: if it has neither.
        ImportError, AttributeError: if there is no such module.
    """
    loaded = sys.modules.get(module)
    if module == "__main__" and loaded is not None and loaded.__file__:
        return [Path(loaded.__file__)]
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(module)
    if spec is None:
        raise ImportError(module)
    file = [spec.origin] if spec.has_location and spec.origin else []
    places = [Path(place) for place in (*file, *(spec.submodule_search_locations or ()))]
    if not places:
        raise ValueError(module)
    return places


def _is_own(places: list[Path]) -> bool:
    both = {place.absolute() for place in places} | {place.resolve() for place in places}
    if any(not _PACKAGES.isdisjoint(place.parts) for place in both):  # including another environment's on sys.path
        return False
    return not any(place.is_relative_to(root) for place in both for root in (*_INSTALLED, _OWN))


def _imports(file: Path, module: str) -> Iterator[str]:
    """Yield the names of all modules that a file imports, at any level of nesting."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            place = "." * node.level + (node.module or "")
            try:
                base = importlib.util.resolve_name(place, package)
            except ImportError:
                continue
            yield base
            yield from (f"{base}.{name.name}" for name in node.names)  # may be a module or some other name
