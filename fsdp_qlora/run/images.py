"""Settles whether a run's conversations may hold images, which decides the class of its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fsdp_qlora.config.auto import Choice, as_word, switch
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.families import reads_images

IMAGES_KEY = "objective.images"


def settle_images(config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings with ``objective.images`` settled by the model's config.json, and checked again if it is on.

    Raises:
        ConfigError: if a setting does not go with images.
        ModelError: if they are asked for, and the model reads none.
    """
    objective = config.objective
    if objective.name != "sft" or switch(objective.images) is False:
        return config
    model_config = load_config(folder, config.model.trust_remote_code, config.model.config_overrides)
    reads = reads_images(model_config)
    if switch(objective.images) and not reads:
        raise ModelError(
            f"objective.images: a {model_config.model_type} reads no images here; set it to false or auto to train on "
            "text alone."
        )
    return check(replace(config, objective=replace(objective, images=as_word(True)))) if reads else config


def settled_on_ranks(config: RunConfig, folder: Path, training: bool, ranks: Ranks) -> RunConfig:
    """Return `settle_images` of a run's settings. Every rank calls it.

    Without rows, to answer, nothing is settled: a model that reads images is then refused as it is built.
    """
    if not training and config.data.train is None:
        return config
    return on_every(lambda: settle_images(config, folder), ranks)


def images_choice(config: RunConfig, model_type: str) -> dict[str, Choice]:
    """Return that a run reads images, by key, if it does; ``config`` is settled."""
    if config.objective.name != "sft" or not switch(config.objective.images):
        return {}
    return {IMAGES_KEY: Choice("true", f"a {model_type} reads images; what its vision tower computes is not planned")}
