"""`merge`: folds an adapter into its base model, and decides into which form of the base (``export.merge_base``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import blamed_on_adapter
from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import FsdpSettings, RunConfig
from fsdp_qlora.distributed.memory import resident_bytes
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.export.folding import Folding
from fsdp_qlora.export.merged import PIECE_BYTES, Merged, export_merged, put, require_free
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.load.stored import packed_format
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.run.build import OpenedModel, open_model, require_adapter
from fsdp_qlora.run.decide import replace_attention
from fsdp_qlora.run.held_out import fits_in_memory, held_out_loss, held_out_rows
from fsdp_qlora.run.inference import with_adapter
from fsdp_qlora.run.world import World
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
        ConfigError: if there are several ranks.
        ModelError: if the adapter does not fit the base, or ``target`` is not empty.
    """
    if world.ranks.size > 1:
        raise ConfigError("what=merged: runs in one process; start it without torchrun.")
    config = replace_attention(replace(with_adapter(config, adapter), fsdp=FsdpSettings()), "eager")
    folder = resolve_folder(config.model.name, config.model.revision)
    opened, folded = _opened(config, folder, adapter, world), StoredAdapter(adapter)
    quantized = (*opened.plan.quantized, *opened.plan.quantized_edges)
    stored = [x for x in quantized if packed_format(opened.source, x.linear.parameter)]
    forms = {
        form: Folding(opened.base, opened.source, folded, packed, world.ranks)
        for form, packed in ((ORIGINAL, stored), (DEQUANTIZED, quantized))
    }
    dtype = str(opened.base.dtype).removeprefix("torch.")
    wide = dtype != "float32" and any(entry.dtype == "F32" for entry in opened.source.entries.values())
    memory = max(folding.largest_bytes for folding in forms.values())
    _log.info(
        "Folding takes at most %s of memory, beside this process's own %s.",
        megabytes(memory + PIECE_BYTES), megabytes(resident_bytes()),
    )  # fmt: skip
    overwrite, rows = config.export.overwrite, None
    merged = partial(Merge, config.model.name, memory=memory, dtype=dtype, rounded="float32" if wide else "")
    form, why = asked(config.export.merge_base), "as asked"
    if form is None and config.run_from is None:
        form, why = ORIGINAL, "without run_from, nothing says what it was trained on"
    elif form is None and len(stored) == len(quantized):
        form, why = ORIGINAL, "the base is stored as it was trained on"
    elif form is None:
        rows, without = held_out_rows(config, folder, opened, world)
        form, why = DEQUANTIZED, f"what the adapter was trained on; not measured: {without}"
    if rows is None:
        return merged(form, why, export_merged(forms[form], folder, target, progress, overwrite))
    require_free(target, overwrite, (folder, adapter))
    with fresh_folder(target) as work:
        written = {form: export_merged(forms[form], folder, work / form, progress) for form in forms}
        room = None if fits_in_memory(opened) else work / "offloaded"
        losses = {form: held_out_loss(work / form, rows, opened.base.dtype, room) for form in forms}
        form = min(losses, key=lambda form: losses[form])
        put(work / form, target, overwrite)
    said = ", ".join(f"{form} {loss:.4f}" for form, loss in losses.items())
    return merged(form, f"loss on {len(rows)} held-out rows: {said}", written[form])


def _opened(config: RunConfig, folder: Path, adapter: Path, world: World) -> OpenedModel:
    try:
        opened = open_model(config, folder, world.ranks, None, say=False)
    except FsdpQloraError as error:
        raise blamed_on_adapter(error, adapter) from error
    require_adapter(adapter, opened, world.ranks)
    return opened
