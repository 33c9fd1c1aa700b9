"""Loads a model for inference: a base in the configured format, with one or several PEFT adapters on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fsdp_qlora.adapters.folder import (
    CHAT_TEMPLATE_NAME,
    blamed_on_adapter,
    load_adapter,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.served import ServedAdapter
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.files.read import own_file
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

    Raises:
        ModelError: if a folder is not an adapter, or not one for this model, or the adapters do not go together.
    """
    if isinstance(adapter, Mapping):
        return _load_several(config, adapter, world)
    if adapter is not None:
        config = _with_adapter(config, adapter)
    try:
        prepared = prepare(config, world, training=False)
    except FsdpQloraError as error:
        raise (error if adapter is None else blamed_on_adapter(error, adapter)) from error
    if adapter is not None:
        load_adapter(adapter, prepared.model, prepared.ranks.shard_rank, prepared.ranks.shard_size, config.lora)
    prepared.model.eval()
    return prepared


def _load_several(config: RunConfig, adapters: Mapping[str, Path], world: World | None) -> Prepared:
    if not adapters:
        raise ModelError("adapter: names no adapter; give {name: folder}, or leave it out.")
    settled = {name: _with_adapter(config, folder) for name, folder in adapters.items()}
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
                f"adapter {name}: {lora.variant} on {size.modules} linears, {size.num_parameters:,} parameters, "
                f"{megabytes(size.num_bytes)} ({megabytes(size.bytes_here)} on this rank)"
            )
    prepared.model.eval()
    return prepared


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


def _with_adapter(config: RunConfig, adapter: Path) -> RunConfig:
    """Return the settings completed from an adapter folder: base model, LoRA settings, and chat template."""
    saved, model, data = read_adapter_config(adapter), config.model, config.data
    if not model.name and saved.base_model:
        model = replace(model, name=saved.base_model, revision=model.revision or saved.revision)
    if data.template is None and (adapter / CHAT_TEMPLATE_NAME).is_file():
        data = replace(data, template=str(own_file(adapter, CHAT_TEMPLATE_NAME)))
    return replace(config, model=model, data=data, lora=saved.settings(stored_modules(adapter, saved)))
