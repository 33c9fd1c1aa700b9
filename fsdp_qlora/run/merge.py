"""`merge`: folds an adapter into its base model, and decides into which form of the base (``export.merge_base``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import blamed_on_adapter
from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import FsdpSettings, RunConfig
from fsdp_qlora.data.loader import Piece
from fsdp_qlora.distributed.memory import resident_bytes
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.export.folding import Folding
from fsdp_qlora.export.merged import PIECE_BYTES, Merged, export_merged
from fsdp_qlora.export.model_folder import MERGE, put, require_free
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.load.stored import packed_format
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.run.build import OpenedModel, open_model, require_adapter
from fsdp_qlora.run.decide import replace_attention
from fsdp_qlora.run.held_out import (
    Logits,
    Measured,
    fits_in_memory,
    held_out_rows,
    measure,
    stored_model,
    trained_model,
)
from fsdp_qlora.run.inference import with_adapter
from fsdp_qlora.run.world import World, require_one_process
from fsdp_qlora.track.console import megabytes

_log = logging.getLogger(__name__)

ORIGINAL, DEQUANTIZED = "original", "dequantized"


@dataclass(frozen=True)
class Merge:
    """What was written, and why that."""

    base: str
    """Name of the base model."""
    form: str
    """``original`` or ``dequantized``: what the adapter was folded into."""
    why: str
    written: Merged
    memory: int
    """Bytes that folding the largest tensor took."""
    dtype: str
    """Dtype of what was rounded."""
    rounded: str = ""
    """The wider dtype of the base's files, if it has one."""
    compared: Mapping[str, Measured] = field(default_factory=dict)
    """With ``export.compare``: the trained model and both forms, on held-out rows."""
    rows: int = 0
    """How many held-out rows were measured on."""


def merge(
    config: RunConfig, adapter: Path, target: Path, world: World, progress: Callable[[int, int], None] | None = None
) -> Merge:
    """Write the base model in 16 bits with the adapter folded in. Call it in one process.

    Args:
        config: the settings of the run that trained the adapter; its format is folded into, and its held-out rows are
            measured on. The adapter names the base model if ``config.model.name`` is empty.
        adapter: a PEFT adapter folder.
        target: where to write; see `export_merged`.
        world: one rank.
        progress: called with (tensors done, total tensors), anew for each form.

    Raises:
        ConfigError: if there are several ranks, or no held-out rows to compare on.
        ModelError: if the adapter does not fit the base, or ``target`` is not empty.
    """
    settings = replace(config, fsdp=FsdpSettings())
    config, folder, opened = open_alone(config, adapter, world)
    folded = StoredAdapter(adapter)
    quantized = (*opened.plan.quantized, *opened.plan.quantized_edges)
    stored = [x for x in quantized if packed_format(opened.source, x.linear.parameter)]
    forms = {
        form: Folding(opened.base, opened.source, folded, packed, world.ranks)
        for form, packed in ((ORIGINAL, stored), (DEQUANTIZED, quantized))
    }
    dtype, wide = _dtypes(opened)
    memory = max(folding.largest_bytes for folding in forms.values())
    _log.info(
        "Folding takes at most %s of memory, beside this process's own %s.",
        megabytes(memory + PIECE_BYTES), megabytes(resident_bytes()),
    )  # fmt: skip
    overwrite, rows = config.export.overwrite, None
    merged = partial(Merge, config.model.name, memory=memory, dtype=dtype, rounded=wide)
    form, why = _settled(config, len(stored) == len(quantized))
    if form is None or config.export.compare:
        rows, without = held_out_rows(config, folder, opened, world)
        if rows is None and config.export.compare:
            raise ConfigError(f"export.compare: there is nothing to measure on: {without}.")
        if form is None and rows is None:
            form, why = DEQUANTIZED, f"what the adapter was trained on; not measured: {without}"
    if rows is None:
        assert form is not None
        return merged(form, why, export_merged(forms[form], folder, target, progress, overwrite))
    require_free(target, MERGE, overwrite, (folder, adapter))
    trained = trained_model(settings, adapter, world) if config.export.compare else None
    with fresh_folder(target) as work:
        written = {form: export_merged(forms[form], folder, work / form, progress) for form in forms}
        room = None if fits_in_memory(opened) else work / "offloaded"
        measured = {form: _measured(work / form, rows, opened, room, trained) for form in forms}
        if form is None:
            form = min(measured, key=lambda form: measured[form].loss)
            said = ", ".join(f"{form} {done.loss:.4f}" for form, done in measured.items())
            why = f"loss on {len(rows)} held-out rows: {said}"
        put(work / form, target, overwrite)
    compared = {} if trained is None else {"trained model": measure(trained, rows), **measured}
    return merged(form, why, written[form], compared=compared, rows=len(rows))


def _dtypes(opened: OpenedModel) -> tuple[str, str]:
    """Return the dtype of what is rounded, and the wider one of the base's files, if it has one."""
    dtype = str(opened.base.dtype).removeprefix("torch.")
    wide = dtype != "float32" and any(entry.dtype == "F32" for entry in opened.source.entries.values())
    return dtype, "float32" if wide else ""


def _settled(config: RunConfig, alike: bool) -> tuple[str | None, str]:
    """Return the form to fold into, and why, where that needs no measuring; ``alike``: both forms are the same."""
    if (form := asked(config.export.merge_base)) is not None:
        return form, "as asked"
    if config.run_from is None:
        return ORIGINAL, "without run_from, nothing says what it was trained on"
    return (ORIGINAL, "the base is stored as it was trained on") if alike else (None, "")


def _measured(
    folder: Path, rows: list[Piece], opened: OpenedModel, room: Path | None, trained: Logits | None
) -> Measured:  # fmt: skip
    with stored_model(folder, opened.base.dtype, room) as logits:
        return measure(logits, rows, trained)


def open_alone(config: RunConfig, adapter: Path, world: World) -> tuple[RunConfig, Path, OpenedModel]:
    """Return the settings completed from an adapter, for one rank; the base model's folder; and that model.

    Raises:
        ConfigError: if there are several ranks.
        ModelError: if the adapter does not fit the base.
    """
    require_one_process(config.what, world.ranks.size)
    config = replace_attention(replace(with_adapter(config, adapter), fsdp=FsdpSettings()), "eager")
    folder = resolve_folder(config.model.name, config.model.revision)
    try:
        opened = open_model(config, folder, world.ranks, None, say=False)
    except FsdpQloraError as error:
        raise blamed_on_adapter(error, adapter) from error
    require_adapter(adapter, opened, world.ranks)
    return config, folder, opened
