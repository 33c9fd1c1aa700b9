"""`compare_bases`: measures an adapter on the base that it was trained on, and on the original one in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fsdp_qlora.adapters.folder import read_adapter_config
from fsdp_qlora.config.schema import FsdpSettings, RunConfig
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.export.served import SERVED_METHODS
from fsdp_qlora.run.held_out import Measured, fits_in_memory, held_out_rows, measure, stored_model, trained_model
from fsdp_qlora.run.merge import open_alone
from fsdp_qlora.run.world import World


@dataclass(frozen=True)
class Compared:
    """An adapter on two bases."""

    trained: Measured
    """On the base as it was in training."""
    original: Measured
    """On the base as it is stored, by plain transformers."""
    rows: int
    """How many held-out rows were measured on."""


def compare_bases(config: RunConfig, adapter: Path, world: World) -> Compared:
    """Measure what an adapter's answers change on the original base. Call it in one process.

    Raises:
        ConfigError: if there are several ranks, no held-out rows, or the base does not fit into memory.
        ModelError: if the adapter does not fit the base, or cannot be on the original one.
    """
    saved, what = read_adapter_config(adapter), ""
    if saved.start is not None:
        what = f"started from the base weights ({saved.start}) and does not fit the original base"
    elif saved.token_ids or saved.parameters or saved.variant not in SERVED_METHODS:
        what = "is more than a LoRA on linears, which is all that transformers loads beside a base"
    if what:
        raise ModelError(f"export.compare: {adapter} {what}; leave it out.")
    settings = replace(config, fsdp=FsdpSettings())
    config, folder, opened = open_alone(config, adapter, world)
    rows, without = held_out_rows(config, folder, opened, world)
    if rows is None or not fits_in_memory(opened):
        raise ConfigError(f"export.compare: nothing can be measured: {without or 'the base does not fit into memory'}.")
    trained = trained_model(settings, adapter, world)
    with stored_model(folder, opened.base.dtype, adapter=adapter) as logits:
        return Compared(measure(trained, rows), measure(logits, rows, trained), len(rows))
