"""Where a plan takes a model's config.json from: a folder, the hub's cache on this machine, or the shapes we know."""

from __future__ import annotations

from pathlib import Path

from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.skeleton import resolve_folder
from fsdp_qlora.plan.known import closest, known_config


def config_for_plan(name: str, revision: str | None = None) -> Path:
    """Return the folder or file of a model's config; never asks the network.

    Raises:
        ModelError: if there is none here.
    """
    if not name or Path(name).expanduser().is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
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
        f"model.name: {name} is no folder, not in the hub's cache here, and not one of the models whose shapes are "
        f"known{' (like ' + ', '.join(like) + ')' if like else ''}. A plan asks no network: fetch its config with "
        f"`hf download {name} config.json`, or name a folder with one."
    )
