"""Losses and gradients of one batch, ours beside those of plain transformers and PEFT with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.adapters.experts import peft_config
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.whole import as_saved
from fsdp_qlora.checks import reference
from fsdp_qlora.data.columns import ColumnRows
from fsdp_qlora.data.labels import IGNORE, ROWS
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor, row_range
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.objectives import build_objective
from tests.build import build, whole
from tests.objectives import Tensors, upstream_model
from tests.tolerances import FP32_LOSSES

ROWS_COMPARED = [0, 1, 2, 3]


def outcome(
    ranks: Ranks, base: Path, settings: dict[str, Any], inputs: Callable[[Tensors], dict[str, Any]], divided_by: str
) -> str:
    """Return ``equal``, or the refusal with its exit code; anything else is a difference, in words.

    Args:
        ranks: the pool's ranks, which all compute the same rows.
        base: folder of the model.
        settings: of a run on some rows.
        inputs: makes upstream's arguments, labels included, of a micro-batch's tensors.
        divided_by: what upstream's loss is a mean over.
    """
    settings = {"precision": {"name": "fp32"}, "model": {"check": "off"}, **settings}
    try:
        prepared = build(ranks, str(base), **settings)
    except FsdpQloraError as error:
        return f"refused ({error.exit_code}): {error}"
    data, plan = prepared.data, prepared.plan
    assert data is not None and data.train is not None
    rows = data.encoder.rows(data.train)
    assert isinstance(rows, ColumnRows)
    objective, batch = build_objective(prepared.settings.objective), rows.collate(ROWS_COMPARED, 0)
    trained = dict(trainable_parameters(prepared.model))
    values = {name: _moved(parameter, ranks) for name, parameter in trained.items()}
    (ours, _), *_ = objective.sums(prepared.model.train(), batch).values()
    ours.backward()
    own = {n: whole(p.grad).detach().clone() for n, p in trained.items() if p.grad is not None}
    model = upstream_model(prepared)
    config = peft_config(plan.targets, [], prepared.settings.lora, objective.task_type)
    adapted = reference.adapt(model, as_saved(config, plan.modules, prepared.shapes, model), values).train()  # type: ignore[arg-type]
    count = len(ROWS_COMPARED) if divided_by == ROWS else int((batch.tensors["labels"] != IGNORE).sum())
    loss: Any = adapted(**inputs(dict(batch.tensors))).loss
    (loss * count * ranks.size).backward()  # each rank has computed the same rows, and ours are added up
    theirs = {n: p.grad for n, p in trainable_parameters(adapted) if p.grad is not None}
    prepared.close()
    if not abs(float(ours) - float(loss) * count) <= FP32_LOSSES * abs(float(ours)):
        return f"loss {float(ours)} and not {float(loss) * count}"
    if own.keys() != theirs.keys():
        return f"gradients of {min(own.keys() ^ theirs.keys())} on one side only"
    off = max(float((own[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12)) for n in own)
    return "equal" if off < 1e-4 else f"gradients are off by {off:.1e}"


@torch.no_grad()
def _moved(parameter: torch.nn.Parameter, ranks: Ranks) -> torch.Tensor:
    """Add random values to a parameter, since adapters start at zero and would hide errors; return it whole."""
    value = whole(parameter).detach().clone()
    value += torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.05
    local_tensor(parameter).copy_(value[slice(*row_range(len(value), ranks.shard_rank, ranks.shard_size))])
    return value
