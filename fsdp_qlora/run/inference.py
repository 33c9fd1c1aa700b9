"""Loads a model for inference: a base in the configured format, with a PEFT adapter on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fsdp_qlora.adapters.folder import (
    CHAT_TEMPLATE_NAME,
    blamed_on_adapter,
    load_adapter,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.model.tokenizer import added_tokens
from fsdp_qlora.run.prepare import prepare
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.world import World


def load_for_inference(config: RunConfig, adapter: Path | None = None, world: World | None = None) -> Prepared:
    """Load a base model in the configured format, with a PEFT adapter on it if one is given.

    The adapter's own config determines rank, scaling and targets, and the base model if ``config.model.name`` is empty.
    With ``lora=none`` and no adapter, the weights are in the compute dtype.

    Raises:
        ModelError: if the folder is not a LoRA adapter, or not one for this model.
    """
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
        prepared = prepare(config, world, training=False, start=start)
    except FsdpQloraError as error:
        raise (error if adapter is None else blamed_on_adapter(error, adapter)) from error
    if adapter is not None:
        _require_same_ids(adapter, prepared)
        load_adapter(adapter, prepared.model, prepared.ranks.shard_rank, prepared.ranks.shard_size, config.lora)
    prepared.model.eval()
    return prepared


def with_adapter(config: RunConfig, adapter: Path) -> RunConfig:
    """Return the settings completed from an adapter folder: base model, LoRA settings, and chat template."""
    saved, model, data = read_adapter_config(adapter), config.model, config.data
    model = replace(model, add_tokens=added_tokens(adapter, saved.token_ids) if saved.token_ids else [])
    if not model.name and saved.base_model:
        model = replace(model, name=saved.base_model, revision=model.revision or saved.revision)
    if data.template is None and (adapter / CHAT_TEMPLATE_NAME).is_file():
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
