"""Settles whether a run's conversations may hold images, which decides the class of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from fsdp_qlora.config.auto import Choice, as_word, switch
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.image_chats import IMAGE_TOKENS
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.errors import ModelError, PlanError
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.families import reads_images
from fsdp_qlora.model.folder import config_for_plan
from fsdp_qlora.model.processor import FILE
from fsdp_qlora.objectives.vision import family_of
from fsdp_qlora.shapes.linears import ModelShapes

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


def images_choice(config: RunConfig, model_type: str, shapes: ModelShapes) -> dict[str, Choice]:
    """Return that a run reads images, by key, if it does; ``config`` is settled."""
    if config.objective.name != "sft" or not switch(config.objective.images):
        return {}
    length = config.data.max_length
    most = length if shapes.tower is None else shapes.tower.tokens(length)
    why = f"a {model_type} reads images; at most {most} tokens of them in a row are planned"
    return {IMAGES_KEY: Choice("true", why)}


def images_stated(config: RunConfig, shapes: ModelShapes, model_config: PreTrainedConfig) -> ModelShapes:
    """Return the shapes with the tokens of as many images in a row as ``plan.images_per_row`` states.

    Raises:
        PlanError: if it states some for a model that reads none.
    """
    if not (count := config.plan.images_per_row):
        return shapes
    if shapes.tower is None:
        raise PlanError(f"plan.images_per_row: a {model_config.model_type} reads no images here; leave it out.")
    folder = config_for_plan(config.model.name, config.model.revision)
    known = folder.is_dir() and (folder / FILE).is_file()
    processor: Mapping[str, Any] = read_json(own_file(folder, FILE), dict[str, Any]) if known else {}
    return _with_most(shapes, count * family_of(model_config).largest(processor))


def images_of_rows(shapes: ModelShapes, data: PreparedData | None) -> ModelShapes:
    """Return the shapes with the most tokens of images in a stored row, if there are rows and a vision tower."""
    if shapes.tower is None or data is None or data.train is None:
        return shapes
    parts = [part for part in (data.train, data.eval) if part is not None and len(part)]
    return _with_most(shapes, max((int(np.max(part[IMAGE_TOKENS])) for part in parts), default=0))


def _with_most(shapes: ModelShapes, tokens: int) -> ModelShapes:
    assert shapes.tower is not None
    return replace(shapes, tower=replace(shapes.tower, most_tokens=tokens))
