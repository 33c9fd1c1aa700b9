"""EVA in a run: training rows go through the sharded base, which settles where its adapters start, and their ranks.

The base is loaded without adapters, searched (`fsdp_qlora.adapters.eva_search`), and let go of; the model with adapters
is then planned and loaded as for any LoRA of these ranks. A run keeps what came out in a file, from which a resumed run
takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.adapters.eva import settled
from fsdp_qlora.adapters.eva_search import Search
from fsdp_qlora.adapters.eva_start import ranks_of, read_directions, starts_of
from fsdp_qlora.adapters.turns import FILE_NAME, Starts, fits
from fsdp_qlora.attention.layout import Layout
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.data.loader import Cut, Loader, MicroBatch, TokenRows, cut_rows
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.data.stream import StreamLoader
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.errors import DataError
from fsdp_qlora.load.safetensors import file_digests
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.run.batches import data_key
from fsdp_qlora.run.build import OpenedModel, load_model
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.starts import kinds_of

_log = logging.getLogger(__name__)


def settle(
    opened: OpenedModel, folder: Path, data: PreparedData | None, ranks: Ranks, asked: RunConfig
) -> tuple[LoraSettings, Starts]:  # fmt: skip
    """Return the settings of the plain LoRA that starts, and A of its targets; ``opened`` cannot be loaded afterwards.

    Every rank calls it.

    Args:
        opened: the model as planned with the largest ranks.
        folder: the base model.
        data: the tokenized rows.
        ranks: the ranks of the run.
        asked: the settings as asked for.

    Raises:
        DataError: if there are no training rows.
        NumericsError: if they settle nothing.
    """
    if data is None:
        raise DataError(
            "data.train: not set, and lora.init_lora_weights=eva starts from what the base makes of training rows. "
            "Give a file, a folder, a hub data set, or a list of them."
        )
    facts = _facts(opened, folder, data, asked)
    file = RunFolder(asked.run.output_root, asked.run.name).path / FILE_NAME
    if fits(file, facts, ranks):
        tensors = on_every(lambda: read_directions(file) if ranks.is_main else {}, ranks)
    else:
        ranks.phases.enter("finding where adapters start (eva)")
        tensors = _search(opened, data, ranks, asked.lora)
    divided = ranks_of(tensors, opened.plan.targets, ranks)
    return settled(asked.lora, divided), starts_of(tensors, facts, ranks)


def _facts(opened: OpenedModel, folder: Path, data: PreparedData, asked: RunConfig) -> dict[str, Any]:
    """Return everything that the directions depend on, apart from versions of libraries, as JSON values."""
    lora, train = asked.lora, asked.train
    return {
        "start": "eva", "seed": asked.run.seed, "rows": data_key(data.key, asked.data),
        "batch": [opened.plan.batch.global_batch_size, train.micro_batch_size, train.micro_batch_tokens],
        "ranks": [lora.method, lora.r, lora.alpha, dict(lora.rank_pattern), dict(lora.alpha_pattern)],
        "eva": [lora.eva_rho, lora.eva_tau, lora.eva_whiten, lora.eva_adjust_scaling_factors],
        "precision": asked.precision.name, "added": list(asked.model.add_tokens),
        "quant": asdict(asked.quant), "targets": kinds_of(opened.plan), "files": file_digests(folder),
    }  # fmt: skip


def _search(opened: OpenedModel, data: PreparedData, ranks: Ranks, lora: LoraSettings) -> dict[str, torch.Tensor]:
    """Load the base without adapters, run rows through it, and return A of the targets on rank 0."""
    features = {x.name: x.in_features for x in opened.shapes.linears if x.name in set(opened.plan.targets)}
    train = replace(opened.config.train, compile="false", kernels="torch", activation_checkpointing="none")
    bare = replace(
        opened, config=replace(opened.config, lora=LoraSettings(), train=train),
        plan=replace(opened.plan, targets=(), parameters=()),
    )  # fmt: skip
    model, _ = load_model(bare, ranks)
    model.eval()
    objective = build_objective(opened.config.objective)
    search, run = Search(model.base, features, lora, ranks), partial(objective.sums, model)
    size = opened.plan.batch.global_batch_size
    number = search.run(_micro_batches(opened.config, size, data, ranks), run)
    tensors = search.collect()
    if ranks.is_main:
        got = sorted(search.divided.values())
        _log.info("eva: %d micro-batches settled %d adapters, of ranks %d to %d", number, len(got), got[0], got[-1])
    return tensors


def _micro_batches(config: RunConfig, size: int, data: PreparedData, ranks: Ranks) -> Iterator[MicroBatch]:
    """Yield the micro-batches of all ranks in the order of their numbers, step by step and epoch by epoch, forever.

    ``size`` is the number of rows in a step.
    """
    train, cut = config.train, Cut(config.train.micro_batch_size, 0, 1, config.train.micro_batch_tokens)
    layout = Layout.of(config.data, train, config.model.attn_implementation)
    if data.stream is not None:
        streamed = StreamLoader(data.stream, size, cut, layout, lambda where, problem: None)
        for step in count():
            yield from streamed.batch_at(step * size).micro_batches
    assert data.train is not None
    rows = layout(TokenRows(data.train))
    loader = Loader(rows, size, cut, config.run.seed, config.data.length_grouped)
    for step in count():
        yield from cut_rows(rows, loader.indices(step * size, size), cut)
