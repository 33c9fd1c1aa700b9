"""`export_served`: a base in 4 bits and an adapter in one folder that servers take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fsdp_qlora.adapters.based import require_base
from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import read_adapter_config
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.export.model_folder import SERVED, require_free
from fsdp_qlora.export.quantized_base import ExportedBase, export_base, written_in_4_bits
from fsdp_qlora.export.served import add_adapter, end_answers, require_fits, require_servable
from fsdp_qlora.export.starts import StartedAdapter
from fsdp_qlora.inference.end_of_turn import end_of_turn
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.inventory import weights_of
from fsdp_qlora.model.folder import resolve_folder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.model.tokenizer import build_tokenizer
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.quantized import format_of
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.run.inference import with_adapter

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What was written."""

    base: str
    """Name of the base model."""
    written: ExportedBase
    end: str | None
    """The text that ends an answer, if that is no token."""


def export_served(
    config: RunConfig,
    folder: Path,
    target: Path,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Served:
    """Write a base in 4 bits with an adapter beside it into the new folder ``target``. Call it in one process.

    Args:
        config: the settings of the run that trained the adapter: its format, its base unless the adapter names one.
        folder: a PEFT adapter folder.
        target: a folder that does not exist yet or is empty, or, with ``export.overwrite``, an earlier one. It appears
            whole.
        device: where to quantize.
        progress: called with (tensors done, total tensors).

    Raises:
        ConfigError: if the adapter was trained on a base in another format than ``config`` says.
        ModelError: if the adapter cannot be served so, is of another base, or ``target`` is not empty.
        StorageError: if ``target`` cannot be written.
    """
    config = with_adapter(config, folder)
    quant_format = format_of(config.quant)
    assert quant_format is not None  # check_verb
    taken, adapter = None, StoredAdapter(folder)
    if read_adapter_config(folder).start is not None:
        adapter = StartedAdapter(folder)
        adapter.require_format(quant_format)
        taken = adapter.taken
    require_servable(adapter)
    require_free(target, SERVED, config.export.overwrite, (folder,))
    name, model = config.model.name, config.model
    source = resolve_folder(name, model.revision)
    dtype = model_dtype(config.precision.name)
    require_fits(adapter, build_skeleton(source, dtype, "eager", model.trust_remote_code))
    base = build_skeleton(source, dtype, "eager", model.trust_remote_code)
    shapes = read_shapes(base)
    packed = [Packed(x, quant_format) for x in written_in_4_bits(shapes)]
    for line in require_base(folder, Base(weights_of(base, source), shapes, packed), name):
        _log.warning(line)
    text: str | None = None

    def complete(staging: Path) -> None:
        nonlocal text
        add_adapter(staging, adapter, Base(weights_of(base, staging), shapes, packed))
        end = end_of_turn(staging, base.config, build_tokenizer(staging, model.trust_remote_code))
        end_answers(staging, end.ids, end.text)
        text = end.text

    written = export_base(
        base, source, target, quant_format, device, progress, taken=taken or (lambda _: None), complete=complete,
        always_index=True, kind=SERVED, overwrite=config.export.overwrite,
    )  # fmt: skip
    return Served(name, written, text)
