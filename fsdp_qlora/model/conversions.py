"""Which of the files' tensors make up each tensor of the model, by transformers' own conversion mapping.

Checkpoints keep each expert by itself, or leave out a prefix; the model stacks experts into one tensor. Only those
conversions are followed that lay whole tensors end to end: then a rank can still read just its own stretch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


def arrangement(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, list[str]]:
    """Return ``{name in the model: names in the files, in order}`` for all that is not stored under its own name.

    Args:
        model: as transformers builds it, on meta, nothing swapped yet.
        stored: the names in the files.

    What another kind of conversion would make is left out, so that its tensor is reported as missing.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, stored = model.state_dict(), set(stored)
    found: dict[str, dict[str | None, list[str]]] = {}
    for name in stored - wanted.keys():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target in wanted and target not in stored:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    arranged: dict[str, list[str]] = {}
    for target, parts in found.items():
        converter = next((by_pattern[p] for p in parts if p is not None), None)
        order = _end_to_end(parts, converter)
        if order is not None:
            arranged[target] = order
    return arranged


def _end_to_end(parts: dict[str | None, list[str]], converter: Any) -> list[str] | None:
    """Return the names in the order in which they follow each other in memory; None where they do not."""
    if converter is None:
        return parts[None] if len(parts[None]) == 1 else None
    lists = [sorted(parts[p], key=dot_natural_key) for p in converter.source_patterns if p in parts]
    steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if steps == [(MergeModulelist, 0)] and len(lists) == 1:
        return lists[0]
    if steps == [(MergeModulelist, 0), (Concatenate, 1)] and len({len(names) for names in lists}) == 1:
        return [name for expert in zip(*lists, strict=True) for name in expert]  # each expert: gate rows, up rows
    if steps == [(Concatenate, 0)]:
        return [name for names in lists for name in names]
    return None
