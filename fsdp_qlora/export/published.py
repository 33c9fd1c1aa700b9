"""What of an export's folder goes to the hub: a closed list of files, without paths of this machine and secrets.

Paths are taken out of the places that hold them (an adapter's base, the model card). What then still has a path of this
machine, the hub's token or a password in a URL is refused, not mended: nobody would notice what was missed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fsdp_qlora.adapters.folder import CONFIG_NAME
from fsdp_qlora.errors import ModelError, SecurityError
from fsdp_qlora.export.model_folder import MARKS
from fsdp_qlora.files.read import own_file, read_json, read_regular, walk
from fsdp_qlora.model.folder import needs_hub

CARD = "README.md"
_PUBLISHED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.gguf", "Modelfile", "LICENSE*", CARD,
)  # fmt: skip
_BINARY = (".safetensors", ".gguf", ".model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Files whose entries are words, among them ones that look like paths."""
_PASSWORD = re.compile(r"://[^\s/@\"']+:[^\s/@\"']+@")
_ABSOLUTE = re.compile(r"(?<![\w./:~<-])(?:~|/[\w.@+*-]+)(?:/[\w.@+*-]+)+/?")
"""An absolute path in a text; ``https://host/path`` is none."""


@dataclass(frozen=True)
class HubBase:
    """A base model that others can fetch."""

    id: str
    revision: str | None = None


def hub_base(name: str | None, revision: str | None) -> HubBase | None:
    """Return the hub id of a base model; None if it is a folder of this machine that did not come from the hub."""
    if not name:
        return None
    if needs_hub(name):
        return HubBase(name, revision)
    parts = Path(name).expanduser().parts  # .../models--owner--name/snapshots/<commit>
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return HubBase("/".join(parts[-3].split("--")[1:]), parts[-1])
    return None


def published_files(folder: Path, base: HubBase | None, card: str) -> dict[str, Path | bytes]:
    """Return the files to upload by their names in the repository: as they are on disk, or their changed content.

    Args:
        folder: a finished export.
        base: what adapters in it name as their base; None: nothing.
        card: the text of README.md.

    Raises:
        ModelError: if the folder holds no weights.
        SecurityError: if a file links outside the folder.
    """
    files: dict[str, Path | bytes] = {}
    for place in sorted(Path(entry.path) for entry in walk(folder)):
        if place.name in MARKS or not any(place.match(pattern) for pattern in _PUBLISHED) or place.is_dir():
            continue
        name = place.relative_to(folder).as_posix()
        file = own_file(folder, name)
        files[name] = _of_adapter(file, base) if place.name == CONFIG_NAME else file
        if place.name == "config.json":
            files[name] = _without(file, "_name_or_path")
        elif place.name == CARD:
            files[name] = without_paths(file.read_text("utf-8")).encode()
    if not any(name.endswith(_BINARY) for name in files):
        raise ModelError(f"export.push: {folder} holds no weights.")
    return files | {CARD: card.encode()}


def _of_adapter(file: Path, base: HubBase | None) -> bytes:
    known = {"base_model_name_or_path": base and base.id, "revision": base and base.revision}
    return _as_json(read_json(file, dict[str, Any]) | known)


def _without(file: Path, key: str) -> bytes | Path:
    values = read_json(file, dict[str, Any])
    return _as_json({name: value for name, value in values.items() if name != key}) if key in values else file


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def without_paths(text: str) -> str:
    """Return a text in which every absolute path is replaced by its last part."""
    return _ABSOLUTE.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], text)


def require_clean(files: Mapping[str, Path | bytes], folders: Iterable[Path], secrets: Iterable[str]) -> None:
    """Check that no file holds a path of this machine or a secret.

    Args:
        files: what `published_files` returned.
        folders: folders of this machine whose paths must not be in it.
        secrets: texts that must not be in it.

    Raises:
        SecurityError: naming the file and what it holds, but not a secret itself.
    """
    paths = sorted({str(folder) for folder in folders if len(folder.parts) > 2})
    home = str(Path.home())
    for name, file in files.items():
        text = _text(file)
        if any(secret and secret in text for secret in secrets) or _PASSWORD.search(text):
            raise SecurityError(f"export.push: {name} holds a password or a token; nothing was uploaded.")
        known = paths if Path(name).name in _VOCABULARIES or home == "/" else [*paths, f"{home}/"]
        if there := [path for path in known if path in text]:
            raise SecurityError(
                f"export.push: {name} holds {there[0]}, a path of this machine; nothing was uploaded. Take it out."
            )


def _text(file: Path | bytes) -> str:
    """Return what a file says in words: all of it, or the metadata of a file of tensors."""
    if isinstance(file, bytes):
        return file.decode("utf-8", "replace")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as stored:
                return json.dumps(stored.metadata() or {})
        except SafetensorError as error:
            raise ModelError(f"export.push: {file} is damaged: {error}.") from error
    return "" if file.suffix in _BINARY else read_regular(file, None).decode("utf-8", "replace")
