"""Loads a model for inference: a base in the configured format, with one or several PEFT adapters on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fsdp_qlora.adapters.folder import blamed_on_adapter, read_adapter_config, stored_modules
from fsdp_qlora.adapters.loading import cast_adapters, load_adapter
from fsdp_qlora.adapters.served import ServedAdapter
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.config.choices import ROW_BY_ROW
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.model.tokenizer import added_tokens, stored_template, template_beside
from fsdp_qlora.parallel.shard import model_dtype
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
    return _to_answer(prepared)


def _to_answer(prepared: Prepared) -> Prepared:
    """Make a loaded model ready for forwards without backward."""
    if prepared.plan.settings.keeps_whole:
        cast_adapters(prepared.model, model_dtype(prepared.settings.precision.name), prepared.shapes.float32)
    prepared.model.eval()
    return prepared


def _load_several(config: RunConfig, adapters: Mapping[str, Path], world: World | None) -> Prepared:
    if not adapters:
        raise ModelError("adapter: names no adapter; give {name: folder}, or leave it out.")
    settled = {name: with_adapter(config, folder) for name, folder in adapters.items()}
    for name, own in settled.items():
        require_plain(name, own)
    require_alike(settled)
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
    return _to_answer(prepared)


def require_plain(name: str, config: RunConfig, where: str = "a base with several adapters") -> None:
    """Check that an adapter leaves the base as it is, as others need it, and PEFT's own layers.

    Raises:
        ModelError: saying what ``where`` does not take.
    """
    if config.lora.start is not None:
        raise ModelError(
            f"adapter: {name} started from the base weights ({config.lora.start}) and needs a base of its own, which "
            f"{where} does not make; load it alone and sharded, or convert it with export.plain_lora=true."
        )
    what = ""
    if config.model.add_tokens:
        what = "has rows of added tokens"
    elif config.lora.trains_masters:
        what = f"trained weights of the base ({', '.join(config.lora.modules_to_save) or 'biases'})"
    elif config.lora.target_parameters:
        what = "adapts stacked experts"
    if what:
        raise ModelError(f"adapter: {name} {what}, and {where} takes none that does; load it alone and sharded.")


def require_alike(settled: Mapping[str, RunConfig]) -> None:
    """Check that the adapters name one base and one chat template."""
    first, *others = settled or [""]
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
    return None if config.data.template is None else stored_template(Path(config.data.template).expanduser())


def with_adapter(config: RunConfig, adapter: Path) -> RunConfig:
    """Return the settings completed from an adapter folder: base model, LoRA settings, and chat template."""
    saved, model, data = read_adapter_config(adapter), config.model, config.data
    model = replace(model, add_tokens=added_tokens(adapter, saved.token_ids) if saved.token_ids else [])
    if not model.name and saved.base_model:
        model = replace(model, name=saved.base_model, revision=model.revision or saved.revision)
    chats = config.objective.name not in ROW_BY_ROW
    if chats and data.template is None and (template := template_beside(adapter)) is not None:
        data = replace(data, template=str(template))
    return replace(config, model=model, data=data, lora=saved.settings(stored_modules(adapter, saved)))


def _require_same_ids(adapter: Path, prepared: Prepared) -> None:
    """Check that the tokens whose rows the adapter has get the ids here that they had in training.

    Raises:
        ModelError: if they get others.
    """
    there = list(read_adapter_config(adapter).token_ids)
    if not (there or prepared.config.model.add_tokens):
        return
    here = prepared.tokenizer.convert_tokens_to_ids(prepared.config.model.add_tokens)
    if there != here:
        raise ModelError(
            f"adapter: {adapter} has rows for the tokens {there}, but with this base model they are {here}: it was "
            "trained on a model with another vocabulary."
        )
