"""Selects the modules that are trained whole (``lora.modules_to_save``), by their full names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.patterns import endings, matches


def whole_modules(shapes: ModelShapes, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of the modules that own the parameters under what ``patterns`` mean, in the model's order.

    A head that shares its table with the embedding means the embedding.

    Args:
        shapes: the model.
        patterns: patterns (`matches`) of module names: of owners of parameters, or of modules around them.

    Raises:
        PlanError: if a pattern means no module, or one that cannot be trained.
    """
    if not patterns:
        return ()
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes.parameters))
    inside: dict[str, list[str]] = {}
    for owner in owners:
        for name in (owner, *around(owner)):
            inside.setdefault(name, []).append(owner)
    if shapes.tied:
        inside.setdefault(shapes.head, []).append(shapes.embedding)
    chosen: set[str] = set()
    for pattern in patterns:
        meant = [name for name in inside if matches(name, pattern)]
        if not meant:
            raise PlanError(
                f"lora.modules_to_save: {pattern!r} matches no module with weights of its own or inside; this model "
                f"has {', '.join(endings(inside))}."
            )
        chosen.update(owner for name in meant for owner in inside[name])
    require_trainable("lora.modules_to_save", shapes, parameters_in(shapes, chosen))
    return tuple(owner for owner in owners if owner in chosen)


def around(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def require_trainable(key: str, shapes: ModelShapes, names: Iterable[str]) -> None:
    """Check that the setting ``key`` can have these parameters of the base trained.

    Raises:
        PlanError: naming the first that cannot.
    """
    for name in names:
        if name in shapes.float32:
            raise PlanError(
                f"{key}: upstream keeps {name} in float32, but its unit computes in another precision. Set "
                "precision=fp32, or leave it out."
            )
        if name.rpartition(".")[0] in (shapes.embedding, shapes.head) and not shapes.edges_apart:
            raise PlanError(f"{key}: {name} can be trained in causal language models only; leave it out.")


def parameters_in(shapes: ModelShapes, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the parameters that these modules own."""
    owners = set(modules)
    return {name: shape for name, shape in shapes.parameters.items() if name.rpartition(".")[0] in owners}
