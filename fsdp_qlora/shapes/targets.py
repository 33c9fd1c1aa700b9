"""Selects the linears that get an adapter: those that ``lora``'s settings name, by their full names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes, quantized_linears
from fsdp_qlora.shapes.patterns import endings, layer_number, matches

ALL_EXPERTS = "experts"
"""The value of ``lora.target_parameters`` for all stacked expert weights."""


def target_linears(
    shapes: ModelShapes, target_modules: str | Sequence[str], exclude_modules: Sequence[str] = (),
    layers_to_transform: Sequence[int] = (),
) -> tuple[str, ...]:  # fmt: skip
    """Return the full names of the linears that get an adapter, in the model's order.

    Args:
        shapes: the model.
        target_modules: ``all-linear``, every linear inside the decoder layers, or patterns (`matches`). Embedding and
            head are meant by their names or the last parts of these, never by a glob; linears of a vision tower by
            patterns that mean none of the decoder layers'.
        exclude_modules: patterns of those that get none.
        layers_to_transform: numbers of the decoder layers whose linears get one; empty = all layers.

    Raises:
        PlanError: if a pattern matches no linear (the message lists the names), or none can take an adapter.
    """
    linears = [x.name for x in quantized_linears(shapes) if not x.stacked]
    candidates = [name for name in linears if name not in shapes.not_adapted]
    if not candidates:
        raise PlanError(
            "lora.target_modules: this model's decoder layers have no linear layer that can take an adapter: each one "
            "has its own forward, has its weight read by other code, is kept in float32 by upstream, or would lose its "
            "adapter in plain PEFT, which looks for it elsewhere."
        )
    edges = [name for name in (shapes.embedding, shapes.head) if shapes.edges_apart and _is_named(name, target_modules)]
    chosen = _meant("lora.target_modules", target_modules, [*candidates, *edges], linears, shapes.beside)
    order = {x.name: place for place, x in enumerate(shapes.linears)}
    chosen = sorted(chosen, key=lambda name: order.get(name, -1)) if shapes.beside else chosen
    if exclude_modules:
        stacked = [x.name for x in _stacked(shapes)]
        of_linears = [item for item in exclude_modules if not any(matches(name, item) for name in stacked)]
        excluded = {name for name in chosen if any(matches(name, item) for item in exclude_modules)}
        _meant("lora.exclude_modules", of_linears, [*candidates, *edges], linears, shapes.beside)
        chosen = [name for name in chosen if name not in excluded]
    if layers_to_transform:
        chosen = _in_layers(chosen, shapes, layers_to_transform)
    if not chosen:
        raise PlanError("lora.exclude_modules: none of lora.target_modules is left.")
    return tuple(chosen)


def _is_named(name: str, target_modules: str | Sequence[str]) -> bool:
    items = [target_modules] if isinstance(target_modules, str) else target_modules
    return any(matches(name, item) for item in items if not {"*", "?"} & set(item))


def _meant(
    key: str, target_modules: str | Sequence[str], candidates: list[str], linears: list[str], beside: Iterable[str] = ()
) -> list[str]:  # fmt: skip
    """Return the candidates that ``target_modules``, the value of the setting ``key``, names.

    A pattern that means none of them may mean some of those ``beside``.
    """
    if target_modules == "all-linear":
        return candidates
    items = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    others: list[str] = []
    for item in items:
        if any(matches(name, item) for name in candidates):
            continue
        if meant := [name for name in beside if matches(name, item)]:
            others += meant
            continue
        if any(matches(name, item) for name in linears):
            raise PlanError(
                f"{key}: plain PEFT could not load an adapter for {item!r} in this model: it renames it, or takes it "
                "for the experts' stacked weights. Leave it out (all-linear does)."
            )
        raise PlanError(
            f"{key}: {item!r} matches none of the model's {len(candidates)} linears; this model has "
            f"{', '.join(endings(candidates))} (or all-linear)."
        )
    return [*(name for name in candidates if any(matches(name, item) for item in items)), *dict.fromkeys(others)]


def _in_layers(names: list[str], shapes: ModelShapes, layers: Sequence[int]) -> list[str]:
    """Return the names that lie in the decoder layers of these numbers."""
    if beyond := [number for number in layers if number >= len(shapes.layers)]:
        raise PlanError(
            f"lora.layers_to_transform: there is no layer {beyond[0]}; this model's {len(shapes.layers)} layers are "
            f"numbered from 0 to {len(shapes.layers) - 1}."
        )
    inside = [name for name in names if layer_number(name, shapes.layers) in layers]
    if not inside:
        raise PlanError("lora.layers_to_transform: none of lora.target_modules lies in these layers.")
    return inside


def target_parameters(
    shapes: ModelShapes, parameters: str | Sequence[str], exclude_modules: Sequence[str] = (),
    layers_to_transform: Sequence[int] = (),
) -> tuple[LinearShape, ...]:  # fmt: skip
    """Return the stacked weights that get adapters, in the order of the model's parameters.

    Args:
        shapes: the model.
        parameters: ``experts``, all of them, or patterns (`matches`); empty = none.
        exclude_modules: patterns of those that get none.
        layers_to_transform: numbers of the decoder layers whose experts get adapters; empty = all layers.

    Raises:
        PlanError: if a pattern matches none, none is left, or the model has none.
    """
    if not parameters:
        return ()
    stacked = _stacked(shapes)
    if not stacked:
        raise PlanError(
            f"lora.target_parameters: {parameters!r} matches nothing: this model has no stacked expert weights that "
            "adapters can be trained on. Leave it empty."
        )
    items = [parameters] if isinstance(parameters, str) else list(parameters)
    for item in items:
        if item != ALL_EXPERTS and not any(matches(x.name, item) for x in stacked):
            ends = dict.fromkeys(".".join(x.name.split(".")[-3:]) for x in stacked)
            raise PlanError(
                f"lora.target_parameters: {item!r} matches none of the model's {len(stacked)} stacked weights; "
                f"this model has {', '.join(ends)} (or {ALL_EXPERTS})."
            )
    chosen = [x for x in stacked if ALL_EXPERTS in items or any(matches(x.name, item) for item in items)]
    chosen = [x for x in chosen if not any(matches(x.name, item) for item in exclude_modules)]
    if layers_to_transform:
        chosen = [x for x in chosen if layer_number(x.name, shapes.layers) in layers_to_transform]
    if not chosen:
        raise PlanError("lora.target_parameters: lora.exclude_modules and lora.layers_to_transform leave none of them.")
    return tuple(chosen)


def _stacked(shapes: ModelShapes) -> list[LinearShape]:
    """Return the stacked weights in the order of the model's parameters, in which PEFT wraps them."""
    order = {name: place for place, name in enumerate(shapes.parameters)}
    return sorted((x for x in quantized_linears(shapes) if x.stacked), key=lambda x: order[x.name])
