"""Loads a model for inference: a base in the configured format, with one or several PEFT adapters on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fsdp_qlora.adapters.folder import (
    CHAT_TEMPLATE_NAME,
    blamed_on_adapter,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.loading import load_adapter
from fsdp_qlora.adapters.served import ServedAdapter
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.config.choices import ROW_BY_ROW
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.model.tokenizer import added_tokens
from fsdp_qlora.run.prepare import prepare
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.world import World
from fsdp_qlora.track.console import megabytes

_log = logging.getLogger(__name__)


def load_for_inference(
    config: RunConfig, adapter: Path | Mapping[str, Path] | None = None, world: World | None = None
) -> Prepared:
    """Load a base model in the configured format, with a PEFT adapter on it if one is given, or with several by name.

    The adapters' own configs determine ranks, scalings and targets, and the base model if ``config.model.name`` is
    empty. Of several, the first is in use; `CausalModel.use_adapter` switches, and ``adapter_names`` of
    `CausalModel.logits` and `CausalModel.generate` chooses one for each row. They are frozen.
    With ``lora=none`` and no adapter, the weights are in the compute dtype.

    Raises:
        ModelError: if a folder is not an adapter, or not one for this model, or the adapters do not go together.
    """
    if isinstance(adapter, Mapping):
        return _load_several(config, adapter, world)
    if adapter is not None:
        config = with_adapter(config, adapter)
    elif config.lora.trains_base:  # nothing is trained here: no float32 masters
        config = replace(config, lora=LoraSettings())
    else:  # the base alone: nothing is taken off it
        config = replace(
            config, lora=replace(config.lora, variant=config.lora.method, init_lora_weights=None, loftq_iter=1)
        )
    try:
        start = own_file(adapter, FILE_NAME) if adapter is not None and config.lora.start is not None else None
        prepared = prepare(config, world, training=False, start=start, bare=adapter is None, adapter=adapter)
    except FsdpQloraError as error:
        raise (error if adapter is None else blamed_on_adapter(error, adapter)) from error
    if adapter is not None:
        _require_same_ids(adapter, prepared)
        load_adapter(adapter, prepared.model, prepared.ranks.shard_rank, prepared.ranks.shard_size, config.lora)
    prepared.model.eval()
    return prepared


def _load_several(config: RunConfig, adapters: Mapping[str, Path], world: World | None) -> Prepared:
    if not adapters:
        raise ModelError("adapter: names no adapter; give {name: folder}, or leave it out.")
    settled = {name: with_adapter(config, folder) for name, folder in adapters.items()}
    for name, own in settled.items():
        _require_plain(name, own)
    _require_alike(settled)
    served = [ServedAdapter(name, folder, settled[name].lora) for name, folder in adapters.items()]
    first = next(iter(settled.values()))
    try:
        prepared = prepare(first, world, training=False, served=served)
    except FsdpQloraError as error:
        raise blamed_on_adapter(error, served[0].folder) from error
    if prepared.ranks.is_main:
        for name, size in prepared.adapters.items():
            lora = settled[name].lora
            _log.info(
                f"adapter {name}: {lora.method} on {size.modules} linears, {size.num_parameters:,} parameters, "
                f"{megabytes(size.num_bytes)} ({megabytes(size.bytes_here)} on this rank)"
            )
    prepared.model.eval()
    return prepared


def _require_plain(name: str, config: RunConfig) -> None:
    """Check that an adapter leaves the base as it is, so that others can use it."""
    if config.lora.start is not None:
        raise ModelError(
            f"adapter: {name} started from the base weights ({config.lora.start}) and needs a base of its own; load it "
            "alone, or convert it with export.plain_lora=true."
        )
    if config.model.add_tokens:
        raise ModelError(
            f"adapter: {name} has rows of added tokens, and a base with several adapters takes none; load it alone."
        )
    if config.lora.trains_masters:
        what = ", ".join(config.lora.modules_to_save) or "biases"
        raise ModelError(
            f"adapter: {name} trained weights of the base ({what}), and a base with several adapters keeps its own; "
            "load it alone."
        )
    if config.lora.target_parameters:
        raise ModelError(
            f"adapter: {name} adapts stacked experts, and a base with several adapters takes none that does; load it "
            "alone."
        )


def _require_alike(settled: Mapping[str, RunConfig]) -> None:
    """Check that the adapters name one base and one chat template."""
    first, *others = settled
    for other in others:
        one, two = settled[first], settled[other]
        if (one.model.name, one.model.revision) != (two.model.name, two.model.revision):
            raise ModelError(
                f"adapter: {first} is for {_called(one)}, and {other} for {_called(two)}. Load them one at a time, or "
                "set model.name if they fit the same base."
            )
        if _template(one) != _template(two):
            raise ModelError(
                f"adapter: {first} and {other} come with different chat templates. Load them one at a time, or set "
                "data.template=FILE for both."
            )


def _called(config: RunConfig) -> str:
    revision = config.model.revision
    return f"{config.model.name or 'no named base'}{f' at revision {revision}' if revision else ''}"


def _template(config: RunConfig) -> str | None:
    return None if config.data.template is None else Path(config.data.template).expanduser().read_text("utf-8")


def with_adapter(config: RunConfig, adapter: Path) -> RunConfig:
    """Return the settings completed from an adapter folder: base model, LoRA settings, and chat template."""
    saved, model, data = read_adapter_config(adapter), config.model, config.data
    model = replace(model, add_tokens=added_tokens(adapter, saved.token_ids) if saved.token_ids else [])
    if not model.name and saved.base_model:
        model = replace(model, name=saved.base_model, revision=model.revision or saved.revision)
    chats = config.objective.name not in ROW_BY_ROW
    if chats and data.template is None and (adapter / CHAT_TEMPLATE_NAME).is_file():
        data = replace(data, template=str(own_file(adapter, CHAT_TEMPLATE_NAME)))
    return replace(config, model=model, data=data, lora=saved.settings(stored_modules(adapter, saved)))


def _require_same_ids(adapter: Path, prepared: Prepared) -> None:
    """Check that the tokens whose rows the adapter has get the ids here that they had in training.

    Raises:
        ModelError: if they get others.
    """
    there = list(read_adapter_config(adapter).token_ids)
    here = prepared.tokenizer.convert_tokens_to_ids(prepared.config.model.add_tokens)
    if there != here:
        raise ModelError(
            f"adapter: {adapter} has rows for the tokens {there}, but with this base model they are {here}: it was "
            "trained on a model with another vocabulary."
        )
