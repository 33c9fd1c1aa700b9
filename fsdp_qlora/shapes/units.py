"""Defines which modules are FSDP units."""

from __future__ import annotations

from fsdp_qlora.shapes.linears import ModelShapes


def fsdp_units(shapes: ModelShapes) -> tuple[tuple[str, ...], ...]:
    """Return the FSDP units as tuples of module names: each decoder layer, embedding and head (one unit if tied).

    Everything else (the final norm) belongs to the root unit.
    """
    if not shapes.edges_apart:
        return tuple((layer,) for layer in shapes.layers)
    edges = ((shapes.embedding, shapes.head),) if shapes.tied else ((shapes.embedding,), (shapes.head,))
    return tuple((layer,) for layer in shapes.layers) + edges
