"""Starts a run from a PEFT adapter of an earlier one (``lora.init_from``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from fsdp_qlora.adapters.folder import WEIGHTS_NAME, read_adapter_config, stored_modules
from fsdp_qlora.adapters.loading import load_adapter
from fsdp_qlora.adapters.method import build_method, of_target
from fsdp_qlora.config.choices import PEFT_METHODS
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.track.console import megabytes

_log = logging.getLogger(__name__)


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
