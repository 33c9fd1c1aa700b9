"""Fills a model's adapters from a PEFT adapter folder: one that is loaded, or one that a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fsdp_qlora.adapters.experts import stacked_tensors, stored_shape, stored_value
from fsdp_qlora.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapted_modules,
    opened_weights,
    read_adapter_config,
    require_shapes,
    stored_modules,
)
from fsdp_qlora.adapters.method import build_method, of_target
from fsdp_qlora.adapters.names import ADAPTER, adapter_parameters, trainable_parameters
from fsdp_qlora.adapters.spellings import in_model
from fsdp_qlora.config.choices import PEFT_METHODS
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import fill_slice
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.shapes.tokens import TOKEN_ROWS
from fsdp_qlora.track.console import megabytes

_log = logging.getLogger(__name__)


@torch.no_grad()
def load_adapter(
    folder: Path, model: nn.Module, shard_rank: int = 0, shard_size: int = 1, lora: LoraSettings | None = None,
    name: str | None = None,
) -> None:  # fmt: skip
    """Fill a model's adapters, attached with the settings ``lora``, from a PEFT adapter folder.

    ``name`` is the adapter's name on the model; None = the one that is trained.

    Raises:
        ModelError: if its tensors do not match the model's by name and shape, or a value is not finite.
    """
    file = own_file(folder, WEIGHTS_NAME)
    parameters = dict(trainable_parameters(model) if name is None else adapter_parameters(model, name))
    modules, exchanged = stored_modules(folder), read_adapter_config(folder).exchanged
    stacks = stacked_tensors(model)
    with opened_weights(file) as stored:
        stored.require_equal_copies()
        lora = lora or LoraSettings()
        fixed = build_method(lora.method).fixed(model, lora, name or ADAPTER)
        known = {**parameters, **fixed}
        stored_as = {key if key in known else in_model(key, known): key for key in stored.keys()}  # noqa: SIM118
        if odd := sorted(stored_as.keys() ^ parameters.keys() ^ fixed.keys()):
            ours = sorted(set(adapted_modules(parameters, file)) - set(modules))
            key = "target_parameters" if any(".experts" in name for name in ours[:1]) else "target_modules"
            hint = f" It has no adapter for {ours[0]}: set lora.{key} to the adapter's." if ours else ""
            if odd[0].endswith(TOKEN_ROWS):
                hint = " One of them has rows of added tokens: set model.add_tokens to the adapter's."
            if fixed.keys() & set(odd):
                hint = _hint_of_projections(lora)
            raise ModelError(f"adapter: {file} and the model differ in {len(odd)} tensors (first: {odd[0]}).{hint}")
        shapes = {
            key: stored_shape(stored, stored_as[key], target.shape, stacks.get(key), exchanged)
            for key, target in known.items()
        }
        require_shapes(file, {key: target.shape for key, target in known.items()}, shapes)
        for key, target in known.items():
            value = stored_value(stored, stored_as[key], target.shape, stacks.get(key), exchanged)
            require_finite(value, f"adapter: {key} in {file}")
            fill_slice(target, value, shard_rank, shard_size)


def _hint_of_projections(lora: LoraSettings) -> str:
    seed = lora.options.get("projection_prng_key", 0)
    return (
        f" The file lacks what {lora.method} never trains, although its config says that it is there "
        f"(save_projection). Copy it again, or set save_projection=false in {CONFIG_NAME}: it is then drawn from "
        f"projection_prng_key={seed}."
    )


def start_from_adapter(folder: Path, lora: LoraSettings, model: nn.Module, ranks: Ranks) -> None:
    """Initialize a model's adapters from a PEFT adapter of an earlier run (``lora.init_from``).

    Raises:
        ModelError: if its rank, alpha or variant differs, or it does not fit this model's adapters.
    """
    config, method = read_adapter_config(folder), build_method(lora.method)
    if config.start is not None:
        raise ModelError(
            f"lora.init_from: the adapter in {folder} started from the base weights ({config.start}), so it needs the "
            "base that its start left; convert it with export.plain_lora=true first."
        )
    modules = stored_modules(folder, config)
    saved = config.settings(modules)
    differ = [
        f"lora.{key}: {ours}, but the adapter in lora.init_from={folder} has {theirs}; set lora.{key}={theirs:{form}}."
        for key, theirs, ours, form in (
            ("r", saved.r, lora.r, ""),
            ("alpha", saved.alpha, float(lora.alpha), "g"),
            ("variant", saved.method, lora.method, ""),
        )
        if theirs != ours and (key == "variant" or key in method.reads)
    ]
    if not differ:
        differ = [*_differ_by_target(saved, lora, folder)]
    if saved.method == lora.method:
        configs = [method.peft([], settings, None) for settings in (saved, lora)]
        pairs = {key: [getattr(config, key) for config in configs] for key in PEFT_METHODS.get(lora.variant, ())}
        differ += [
            f"lora.options: {key}={ours!r}, but the adapter in lora.init_from={folder} has {key}={theirs!r}."
            for key, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
    if differ:
        raise ModelError("\n".join(differ))
    load_adapter(folder, model, ranks.shard_rank, ranks.shard_size, lora)
    if ranks.is_main:
        size = own_file(folder, WEIGHTS_NAME).stat().st_size
        _log.info(f"started from {folder}: {saved.method} on {len(modules)} linears, {megabytes(size)}")


def _differ_by_target(saved: LoraSettings, lora: LoraSettings, folder: Path) -> Iterator[str]:
    """Yield a line for the first target whose rank or alpha differs from the stored adapter's."""
    for name in (*saved.target_modules, *saved.target_parameters):
        theirs, ours = (of_target(settings, name) for settings in (saved, lora))
        for key, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
            if (there := getattr(theirs, key)) != (here := getattr(ours, key)):
                yield (
                    f"lora.{pattern}: {key} of {name} is {here:g}, but {there:g} in the adapter in "
                    f"lora.init_from={folder}."
                )
                return
