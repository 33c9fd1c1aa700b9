"""`fsdp.offload_modules`: which unquantized parameters stay in host memory and are copied in when needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from math import prod

from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import ModelShapes


def offloaded_parameters(
    patterns: Sequence[str], shapes: ModelShapes, packed: Collection[str], quantized: Collection[str]
) -> frozenset[str]:
    """Return the names of the parameters that stay in host memory.

    Args:
        patterns: patterns of module names; each selects all parameters inside the modules it matches. ``head``,
            ``embeddings`` and ``norms`` stand for those modules.
        shapes: the model.
        packed: names of the parameters that are stored quantized.
        quantized: names of the modules that hold them; their other parameters (a bias) stay on the device too.

    Raises:
        PlanError: if a pattern matches nothing or only quantized weights, or a parameter that several modules share.
    """
    offloaded: set[str] = set()
    for pattern in patterns:
        matched = _matched(pattern, shapes)
        if not matched:
            raise PlanError(
                f"fsdp.offload_modules: {pattern!r} matches no module of this model; give head, embeddings, norms or a "
                f"pattern that matches a whole name, such as {shapes.embedding or shapes.layers[0]} or *.norm."
            )
        whole = {name for name in matched if name not in packed and name.rpartition(".")[0] not in quantized}
        if not whole:
            raise PlanError(
                f"fsdp.offload_modules: everything that {pattern!r} matches is quantized, and such weights are "
                "multiplied together with their adapters; fsdp.offload=params keeps all shards in host memory."
            )
        offloaded |= whole
    edges = (f"{shapes.embedding}.", f"{shapes.head}.")
    if not shapes.edges_apart and (bound := sorted(name for name in offloaded if name.startswith(edges))):
        raise PlanError(
            f"fsdp.offload_modules: {bound[0]} is shared by several modules of this model and stays on the device."
        )
    return frozenset(offloaded)


def most_inside(offloaded: Collection[str], shapes: ModelShapes) -> int:
    """Return the number of elements in host memory of the decoder layer that has most of them there."""
    each = (sum(prod(shapes.parameters[name]) for name in offloaded if name.startswith(f"{x}.")) for x in shapes.layers)
    return max(each, default=0)


def _matched(pattern: str, shapes: ModelShapes) -> set[str]:
    head = shapes.embedding if shapes.tied else shapes.head
    pattern = {"head": head, "embeddings": shapes.embedding, "norms": "*[nN]orm*"}.get(pattern, pattern)
    if shapes.tied and fnmatchcase(shapes.head, pattern):
        pattern = head
    matched = set()
    for name in shapes.parameters:
        parts = name.split(".")[:-1]
        if any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1)):
            matched.add(name)
    return matched
