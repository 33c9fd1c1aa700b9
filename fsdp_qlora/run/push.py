"""`push`: a finished export goes to the hub, with a card and without what belongs to this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.adapters.folder import CONFIG_NAME, read_adapter_config
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.export.hub import push_files, token_secrets
from fsdp_qlora.export.hub_card import adapter_card, model_card
from fsdp_qlora.export.published import CARD, HubBase, hub_base, published_files, require_clean
from fsdp_qlora.files.read import own_file, read_regular
from fsdp_qlora.run.folder import RunFolder


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    url: str
    """The commit."""
    files: int
    base: HubBase | None
    """The base model that the repository names."""


def push(config: RunConfig, folder: Path, adapter: Path | None) -> Pushed:
    """Upload the export in ``folder`` to the repository ``config.export.push``.

    Args:
        config: the settings of the export. ``model.name`` may name the base on the hub.
        folder: the finished export.
        adapter: the adapter that it was made with; its card has the results, and it names the base.

    Raises:
        ConfigError: if the user may not write to the repository.
        SecurityError: if a file holds a path of this machine, or a secret.
        StorageError: if the hub cannot be reached, or does not have the files afterwards.
    """
    repo = config.export.push
    assert repo is not None
    base = _base(config, adapter)
    card = _card(adapter)
    holds_base = (folder / "config.json").is_file()
    if (folder / CONFIG_NAME).is_file() and not holds_base:
        text = adapter_card(card, repo, base)
    else:
        text = model_card(config.what, repo, base, card)
    # An adapter beside its base belongs to that, not to the one on the hub that it was made of.
    files = published_files(folder, HubBase(repo) if holds_base else base, text)
    require_clean(files, _own_folders(config, folder, adapter), token_secrets())
    url = push_files(repo, files, f"fsdp-qlora export what={config.what}")
    return Pushed(url, len(files), base)


def _base(config: RunConfig, adapter: Path | None) -> HubBase | None:
    """Return the base model on the hub: the settings', or else the one that the adapter names."""
    model = config.model
    if model.name and (named := hub_base(model.name, model.revision)) is not None:
        return named
    if adapter is None:
        return None
    there = read_adapter_config(adapter)
    return hub_base(there.base_model, there.revision)


def _card(adapter: Path | None) -> str | None:
    if adapter is None or not (adapter / CARD).is_file():
        return None
    return read_regular(own_file(adapter, CARD)).decode("utf-8", "replace")


def _own_folders(config: RunConfig, folder: Path, adapter: Path | None) -> list[Path]:
    """Return the folders of this machine that are known to have been in use."""
    places: list[Any] = [folder, adapter, config.model.name, config.run.output_root, Path.cwd()]
    places += [RunFolder(config.run.output_root, config.run.name).path]
    places += [read_adapter_config(adapter).base_model] if adapter else []
    paths = [Path(place).expanduser() for place in places if place]
    return sorted({path.absolute() for path in paths if path.is_dir()})
