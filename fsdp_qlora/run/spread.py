"""Loads a model over all devices of one process, with plain transformers (``generate.device_map``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.adapters.folder import blamed_on_adapter
from fsdp_qlora.adapters.stock import attach_stock
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.inference.spread import (
    SpreadModel,
    describe,
    load_spread,
    main_device,
    memory_limits,
    placed,
)
from fsdp_qlora.load.stored import quantization_of
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.sizes import parse_bytes
from fsdp_qlora.quant.formats.plain import bitsandbytes_config
from fsdp_qlora.run.build import open_model, require_adapter
from fsdp_qlora.run.inference import require_alike, require_plain, with_adapter
from fsdp_qlora.run.tokens import open_tokenizer
from fsdp_qlora.run.world import World

_log = logging.getLogger(__name__)
_OWN_ATTENTION = ("auto", "blockwise", "varlen")
"""Choices of attention that are made or computed here; transformers makes its own."""


@dataclass(frozen=True)
class Spread:
    """A model on all devices of this process, and what answering needs beside it."""

    model: SpreadModel
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    """This process alone."""
    folder: Path
    """The base model's folder."""
    max_positions: int
    """Positions that the model has; 0: unknown."""
    places: Mapping[str, str] = field(default_factory=dict)
    """The device of each part of the model."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """The adapters, if they were given names."""


def load_over_devices(config: RunConfig, adapter: Path | Mapping[str, Path] | None, world: World) -> Spread:
    """Load a base with transformers, bitsandbytes and accelerate, and adapters on it with PEFT.

    Everything that can be checked without weights is checked as for a sharded model.

    Raises:
        ConfigError: if the model does not fit so.
        ModelError: if a folder is not an adapter, or one that plain transformers cannot put on this base.
    """
    check(config)
    named = dict(adapter) if isinstance(adapter, Mapping) else {} if adapter is None else {"": adapter}
    settled = {name: with_adapter(config, folder) for name, folder in named.items()}
    for name, own in settled.items():
        require_plain(name or str(adapter), own, "plain transformers")
    require_alike(settled)
    first = next(iter(settled.values()), replace(config, lora=LoraSettings(target_modules=[])))
    if first.generate.offload_fp32 and world.ranks.device.type == "cpu":
        raise ConfigError(
            "generate.offload_fp32: leaves layers in host memory unquantized, and without an accelerator that is all "
            "of them; set quant=none, or leave it out."
        )
    folder = resolve_folder(first.model.name, first.model.revision)
    attention = None if (chosen := first.model.attn_implementation) in _OWN_ATTENTION else chosen
    on_meta = replace(first, model=replace(first.model, attn_implementation="eager"))
    try:
        opened = open_model(on_meta, folder, world.ranks, None)
    except FsdpQloraError as error:
        raise (blamed_on_adapter(error, next(iter(named.values()))) if named else error) from error
    for one in named.values():
        require_adapter(one, opened, world.ranks)
    dtype, device = model_dtype(first.precision.name), world.ranks.device
    limits = {name: parse_bytes(size, "generate.max_memory") for name, size in first.generate.max_memory.items()}
    packed = None if quantization_of(folder) else bitsandbytes_config(first.quant, dtype, first.generate.offload_fp32)
    tokenizer = open_tokenizer(first, folder)
    loaded = load_spread(
        folder, dtype, first.generate, packed, memory_limits(limits, device), attention, first.model.trust_remote_code
    )
    places = placed(loaded, device)
    _log.info("generate.device_map=%s: %s", first.generate.device_map, describe(loaded, places))
    computes = main_device(places, device)
    model = attach_stock(loaded, named, computes) if named else loaded
    return Spread(
        SpreadModel(model, computes), tokenizer, world.ranks, folder, opened.shapes.max_positions, places,
        {name: path for name, path in named.items() if name},
    )  # fmt: skip
