"""Keeps what a run's adapters started from: a file in its folder, from which the base can be rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsdp_qlora.adapters.turns import FILE_NAME, fits, write_starts
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_main
from fsdp_qlora.load.safetensors import file_digests
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.quant.formats import Format
from fsdp_qlora.run.build import OpenedModel
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.prepared import Prepared


def start_facts(opened: OpenedModel | Prepared, folder: Path) -> dict[str, Any]:
    """Return everything that the initial factors depend on, apart from versions of libraries, as JSON values."""
    config = opened.config if isinstance(opened, OpenedModel) else opened.settings
    plan = opened.plan
    lora = config.lora
    return {
        "start": lora.start,
        "seed": config.run.seed,
        "loftq_iter": lora.loftq_iter,
        "scaling": [lora.method, lora.r, lora.alpha, dict(lora.rank_pattern), dict(lora.alpha_pattern)],
        "targets": kinds_of(plan),
        "files": file_digests(folder),
    }


def kinds_of(plan: TrainPlan) -> dict[str, list[Any]]:
    """Return how each target of adapters is stored."""
    formats = {x.linear.name: x.quant_format for x in plan.quantized}
    return {name: _kind(formats.get(name)) for name in plan.targets}


def _kind(quant_format: Format | None) -> list[Any]:
    """Return the arguments of `build_format`; none for a weight that is not quantized."""
    if quant_format is None:
        return []
    return [quant_format.name, quant_format.double_quant, quant_format.block_size, quant_format.threshold]


def kept_start(opened: OpenedModel, folder: Path, ranks: Ranks) -> Path | None:
    """Return the run's file of initial factors, or None if it has none for these settings. Every rank calls it."""
    run = opened.config.run
    file = RunFolder(run.output_root, run.name).path / FILE_NAME
    return file if fits(file, start_facts(opened, folder), ranks) else None


def keep_start(prepared: Prepared, folder: RunFolder) -> None:
    """Write the initial factors into the run's folder, unless they are there. Every rank calls it."""
    starts = prepared.model.starts
    if not starts.digest:
        return
    file, facts = folder.path / FILE_NAME, starts.facts or start_facts(prepared, prepared.folder)
    if not fits(file, facts, prepared.ranks):
        on_main(lambda: write_starts(file, starts, facts), prepared.ranks)
    starts.tensors.clear()
