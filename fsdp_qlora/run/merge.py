"""`merge`: folds an adapter into its base model, and decides into which form of the base (``export.merge_base``)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import blamed_on_adapter
from fsdp_qlora.checks.twin import Verdict
from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import FsdpSettings, RunConfig
from fsdp_qlora.data.loader import Piece, TokenRows
from fsdp_qlora.distributed.memory import host_memory
from fsdp_qlora.errors import ConfigError, FsdpQloraError
from fsdp_qlora.export.folding import Folding
from fsdp_qlora.export.merged import Merged, export_merged, put, require_free
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.load.stored import packed_format
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.run.build import OpenedModel, open_model, require_adapter
from fsdp_qlora.run.decide import replace_attention
from fsdp_qlora.run.inference import with_adapter
from fsdp_qlora.run.tokens import tokenize
from fsdp_qlora.run.world import World

ORIGINAL, DEQUANTIZED = "original", "dequantized"
MOST_ROWS = 64
"""Held-out rows to measure on."""
MOST_SECONDS = 900.0
"""Longest estimated time of measuring both forms."""
_SHARE = 0.6
"""Share of the machine's memory that the model may take while it is measured."""


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
    opened = _opened(config, folder, adapter, world)
    folded = StoredAdapter(adapter)
    quantized = (*opened.plan.quantized, *opened.plan.quantized_edges)
    stored = [x for x in quantized if packed_format(opened.source, x.linear.parameter)]
    forms = {
        form: Folding(opened.base, opened.source, folded, packed, world.ranks)
        for form, packed in ((ORIGINAL, stored), (DEQUANTIZED, quantized))
    }
    dtype = str(opened.base.dtype).removeprefix("torch.")
    wide = dtype != "float32" and any(entry.dtype == "F32" for entry in opened.source.entries.values())
    rounded = "float32" if wide else ""
    memory = max(folding.largest_bytes for folding in forms.values())

    def write(form: str, to: Path, overwrite: bool = False) -> Merged:
        return export_merged(forms[form], folder, to, progress, overwrite)

    overwrite, rows = config.export.overwrite, None
    form, why = asked(config.export.merge_base), "as asked"
    if form is None and config.run_from is None:
        form, why = ORIGINAL, "without run_from, nothing says what it was trained on"
    elif form is None and len(stored) == len(quantized):
        form, why = ORIGINAL, "the base is stored as it was trained on"
    elif form is None:
        rows, without = _held_out(config, folder, opened, world)
        form, why = DEQUANTIZED, f"what the adapter was trained on; not measured: {without}"
    if rows is None:
        return Merge(config.model.name, form, why, write(form, target, overwrite), memory, dtype, rounded)
    require_free(target, overwrite, (folder, adapter))
    with fresh_folder(target) as work:
        written = {form: write(form, work / form) for form in forms}
        losses = {form: held_out_loss(work / form, rows, opened.base.dtype) for form in forms}
        form = min(losses, key=lambda form: losses[form])
        put(work / form, target, overwrite)
    said = ", ".join(f"{form} {loss:.4f}" for form, loss in losses.items())
    why = f"loss on {len(rows)} held-out rows: {said}"
    return Merge(config.model.name, form, why, written[form], memory, dtype, rounded)


def _opened(config: RunConfig, folder: Path, adapter: Path, world: World) -> OpenedModel:
    try:
        opened = open_model(config, folder, world.ranks, None, say=False)
    except FsdpQloraError as error:
        raise blamed_on_adapter(error, adapter) from error
    require_adapter(adapter, opened, world.ranks)
    return opened


def _held_out(config: RunConfig, folder: Path, opened: OpenedModel, world: World) -> tuple[list[Piece] | None, str]:
    """Return rows to measure on, as ``(input_ids, learned)``; or None, and why there are none."""
    none = "no held-out rows (data.eval, or data.train with data.eval_fraction)"
    if config.data.train is None and config.data.eval is None:
        return None, none
    data = replace(config.data, train=config.data.train or config.data.eval)
    _, prepared = tokenize(replace(config, data=data), folder, opened, Verdict("eager"), world)
    if prepared is None or prepared.eval is None or not len(prepared.eval):
        return None, none
    held = TokenRows(prepared.eval)
    rows = [held.row(number) for number in range(min(MOST_ROWS, len(held)))]
    size, (available, _) = 2 * opened.plan.base_parameters, host_memory()
    if size > _SHARE * available:
        return None, f"the model takes {size / 1e9:.0f} GB in 16 bits, and this machine has {available / 1e9:.0f} GB"
    tokens = sum(len(ids) for ids, _ in rows)
    seconds = 2 * 2 * opened.plan.base_parameters * tokens / _rate(opened.base.dtype)
    if seconds > MOST_SECONDS:
        return None, f"it would take about {seconds / 60:.0f} minutes"
    return rows, ""


def _rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a matrix product here."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        torch.mm(matrix, matrix)
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - started)


@torch.no_grad()
def held_out_loss(folder: Path, rows: list[Piece], dtype: torch.dtype) -> float:
    """Return the mean loss of the learned tokens, computed by plain transformers on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.eval()
    total, count = 0.0, 0
    for ids, learned in rows:
        logits = model(input_ids=ids.long()[None]).logits[0, :-1].float()
        losses = nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")
        total += float(losses[learned[1:]].double().sum())
        count += int(learned[1:].sum())
    return total / count if count else math.nan
