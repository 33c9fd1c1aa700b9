"""The fate of each parameter: quantized, kept as it is, or trained."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.shapes.linears import ModelShapes


def fates(plan: TrainPlan, shapes: ModelShapes) -> dict[str, dict[str, int]]:
    """Return ``{"quantized" | "kept" | "trained": {name: count}}``, with ``*`` for layer numbers in names."""
    packed = {x.linear.parameter for x in (*plan.quantized, *plan.quantized_edges)}
    trained = [*plan.memory.adapters.rows, *(name for tensors in plan.memory.trained.values() for name in tensors)]
    return {
        "quantized": alike(name for name in shapes.parameters if name in packed),
        "kept": alike(name for name in shapes.parameters if name not in packed and name not in plan.memory.masters),
        "trained": alike(name.removeprefix("base_model.model.") for name in trained),
    }


def alike(names: Iterable[str]) -> dict[str, int]:
    """Count ``names`` after replacing layer numbers by ``*``."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return counts
