"""Finds a model's folder: a local one, or its download from the hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fsdp_qlora.attention.blockwise import BLOCKWISE  # noqa: F401 - registers it
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.errors import ModelError, typed_line
from fsdp_qlora.shapes.known import closest, known_config
from fsdp_qlora.track.bars import LINE_SECONDS

_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def needs_hub(name: str) -> bool:
    """Whether ``name`` is a hub id (``owner/name``, or an old ``name`` like gpt2) rather than a local folder."""
    folder = Path(name).expanduser()
    return not (folder.is_dir() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1)


def resolve_folder(name: str, revision: str | None = None) -> Path:
    """Return a model's folder: ``name`` itself if it is a local folder, else its download from the hub.

    Raises:
        ModelError: if the folder does not exist, or the download fails.
    """
    if not name:
        raise ModelError(
            "model.name: not set. Give a hub name (model.name=Qwen/Qwen3-8B), a folder, or experiment=quickstart."
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name: {name} has no config.json: it is not a transformers model folder.")
        return folder.absolute()
    if not needs_hub(name):
        raise ModelError(f"model.name: there is no folder {name}.{_embedded_hint(name)}")
    return _download(name, revision)


def _embedded_hint(name: str) -> str:
    if "embedded" in Path(name).parts:
        return (
            " The embedded model and data are fetched by `fsdp-qlora prepare experiment=quickstart` (or `make train`)."
        )
    return ""


class _Lines:
    """Takes what tqdm draws and prints it as lines."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: every line is written at once."""


class _HubBar(tqdm):
    """The hub's progress bar on a terminal; elsewhere a line now and then, and none for short downloads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty():
            kwargs |= {"file": _Lines(), "delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "ncols": 80}
        super().__init__(*args, **{**kwargs, "disable": False})


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    folder = Path(name).absolute()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOAD_PATTERNS, tqdm_class=_HubBar))
    except Exception as error:  # the hub's errors, or those of whichever HTTP library it uses
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        raise ModelError(
            f"model.name: {name} is not a local folder, and the hub did not provide it{offline}: {typed_line(error)} "
            f"Looked for: the folder {folder}{_beside(folder)}; then {name} on {constants.ENDPOINT}. Names that "
            "begin with ./ or / are always folders."
        ) from error


def _beside(folder: Path) -> str:
    """Return a hint at what a missing folder's name may be a misspelling of, to append to the name."""
    try:
        there = sorted(place.name for place in folder.parent.iterdir() if place.is_dir())
    except OSError:  # its parent folder is missing, too
        return ""
    return f" ({folder.parent.name} exists, but does not contain it.{nearest(folder.name, there)})"


def config_for_plan(name: str, revision: str | None = None) -> Path:
    """Return the folder or file of a model's config; never uses the network.

    Raises:
        ModelError: if there is none on this machine.
    """
    if not needs_hub(name):
        return resolve_folder(name, revision)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(f"model.name: {error}") from error
    if isinstance(cached, str):
        return Path(cached).parent
    if (known := known_config(name)) is not None:
        return known
    like = closest(name)
    raise ModelError(
        f"model.name: {name} is not a folder, not in the local hub cache, and not one of the models whose shapes are "
        f"known{' (like ' + ', '.join(like) + ')' if like else ''}. A plan uses no network: fetch its config with "
        f"`hf download {name} config.json`, or name a folder with one."
    )
