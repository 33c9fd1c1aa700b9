"""The storage format of each weight: that of `quant`, unless `quant.overrides` sets another."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import prod

from fsdp_qlora.config.schema import QuantSettings
from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.formats import Format, Packed, build_format
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes, quantized_edges, quantized_linears
from fsdp_qlora.shapes.patterns import endings

_MOST_KEPT = 0.1
"""Share of the weights of layers and linears that may stay in 16 bits without confirmation."""


def format_of(settings: QuantSettings, name: str | None = None) -> Format:
    """Return the format ``name`` (default: that of the settings; not ``none``) with the settings' options."""
    name = settings.name if name is None else name
    return build_format(name, settings.double_quant, settings.block_size, settings.llm_int8_threshold)


def chosen_linears(settings: QuantSettings, shapes: ModelShapes) -> tuple[Packed, ...]:
    """Return the weights that are stored quantized: those of the decoder layers, then those of a vision tower.

    Raises:
        PlanError: if a pattern matches nothing, much of the layers and linears would stay in 16 bits unasked, or a
            model without a vision tower should have one quantized.
    """
    inside, beside = quantized_linears(shapes), _of_images(settings, shapes)
    formats = {x.name: settings.name for x in inside} | {x.name: settings.vision for x in beside}
    formats |= _overridden(settings.overrides, list(formats))
    both = (*inside, *beside)
    chosen = tuple(Packed(x, format_of(settings, formats[x.name])) for x in both if formats[x.name] != "none")
    if chosen and not settings.allow_16bit:
        _require_most(shapes, {x.parameter for x in inside})
    return chosen


def chosen_edges(settings: QuantSettings, shapes: ModelShapes) -> tuple[Packed, ...]:
    """Return embedding and head if they are stored quantized.

    Raises:
        PlanError: if they should be quantized, but are not separate units in this model.
    """
    if settings.embeddings == "none":
        return ()
    if not shapes.edges_apart:
        raise PlanError("quant.embeddings: only those of causal language models can be quantized; set it to none.")
    return tuple(Packed(x, format_of(settings, settings.embeddings)) for x in quantized_edges(shapes))


def _of_images(settings: QuantSettings, shapes: ModelShapes) -> list[LinearShape]:
    """Return the linears that only images pass through, if they are quantized."""
    if settings.vision == "none":
        return []
    if shapes.tower is None:
        raise PlanError("quant.vision: this model reads no images here, so it has no vision tower; set it to none.")
    return [x for x in shapes.linears if x.name in shapes.beside]


def _overridden(overrides: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Return name -> format for the linears that a pattern matches; later patterns win."""
    kinds: dict[str, str] = {}
    for pattern, kind in overrides.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise PlanError(
                f"quant.overrides: {pattern!r} matches none of the {len(names)} linears that are quantized; a "
                f"pattern must match the whole name, such as *.{endings(names)[0]} or {names[0]} (this model has "
                f"{', '.join(endings(names))})."
            )
        kinds |= dict.fromkeys(matched, kind)
    return kinds


def _require_most(shapes: ModelShapes, can: set[str]) -> None:
    outside = {x.parameter for x in shapes.linears if x.name not in shapes.beside}
    kept = {
        name: prod(shape)
        for name, shape in shapes.parameters.items()
        if name not in can
        and name not in shapes.left_dense
        and (name in outside or any(name.startswith(layer + ".") for layer in shapes.layers))
    }
    share = sum(kept.values()) / max(1, sum(kept.values()) + sum(prod(shapes.parameters[name]) for name in can))
    if share > _MOST_KEPT:
        largest = max(kept, key=lambda name: kept[name])
        raise PlanError(
            f"quant: {100 * share:.0f} % of the weights of layers and linears would stay in 16 bits, the largest "
            f"{largest} {list(shapes.parameters[largest])}: this kind of weight, or a linear outside the layers, "
            "cannot be quantized here. Set quant.allow_16bit=true to continue anyway."
        )


def describe(packed: tuple[Packed, ...]) -> str:
    """Return the number of weights in each format: ``24 int8, 186 nf4 with double quantization``."""
    counts: dict[str, int] = {}
    for x in packed:
        words = x.quant_format.describe()
        counts[words] = counts.get(words, 0) + 1
    return ", ".join(f"{count} {words}" for words, count in counts.items()) or "none"
