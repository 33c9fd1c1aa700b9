"""Maps tensors in the files to tensors of the model, by transformers' own conversion mapping.

Checkpoints store each expert separately, omit a prefix, or split or transpose tensors that the model stacks. Where a
tensor is a plain concatenation of stored ones, a rank still reads only its own range. Any other conversion runs
upstream's own code on the whole tensors it needs, one conversion at a time: slower to load, but never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
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

Read = Callable[[str], torch.Tensor]
"""Reads a whole tensor from the files."""


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that upstream's code converts to one or several tensors of the model."""

    target: str
    """The first of the tensors it produces."""
    converter: WeightConverter
    parts: tuple[tuple[str, str], ...]
    """``(name in the files, pattern it matched)``, in order."""
    model: PreTrainedModel

    def run(self, read: Read) -> dict[str, torch.Tensor]:
        """Return the converted tensors, by their names in the model."""
        converter = deepcopy(self.converter)
        for name, pattern in self.parts:
            converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Arrangement:
    """The source of each tensor of the model that is not stored under its own name."""

    end_to_end: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name in the model -> names in the files, in order of concatenation."""
    converted: Mapping[str, Conversion] = field(default_factory=dict)
    """Name in the model -> the conversion that produces it."""


def arrangement(model: PreTrainedModel, stored: Iterable[str]) -> Arrangement:
    """Return the sources of the tensors that the files hold under other names or in other shapes than ``model``.

    Args:
        model: the model as transformers builds it on meta, before any module is swapped.
        stored: the names in the files.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted, stored = model.state_dict(), set(stored)
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target in wanted and (pattern is not None or name not in wanted):
            sources.setdefault(target, []).append((name, pattern))
    end_to_end: dict[str, list[str]] = {}
    converted: dict[str, Conversion] = {}
    for target, parts in sources.items():
        converter = next((by_pattern[pattern] for _, pattern in parts if pattern is not None), None)
        order = _end_to_end(_by_pattern(parts), converter)
        if order is not None:
            if target not in stored:
                end_to_end[target] = order
        elif converter is not None:
            whole = Conversion(target, converter, tuple((name, str(pattern)) for name, pattern in parts), model)
            converted |= dict.fromkeys(_targets(whole, wanted), whole)
    return Arrangement(end_to_end, converted)


def _by_pattern(parts: list[tuple[str, str | None]]) -> dict[str | None, list[str]]:
    by_pattern: dict[str | None, list[str]] = {}
    for name, pattern in parts:
        by_pattern.setdefault(pattern, []).append(name)
    return by_pattern


def _targets(conversion: Conversion, wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of all tensors that a conversion produces: its target, and that name by its other patterns."""
    first, *others = conversion.converter.target_patterns
    plain = first.replace("\\", "").strip("^$")
    names = [conversion.target.replace(plain, other.replace("\\", "").strip("^$")) for other in others]
    return [conversion.target, *(name for name in names if name in wanted)]


def _end_to_end(parts: dict[str | None, list[str]], converter: Any) -> list[str] | None:
    """Return the names in order of concatenation; None if the target is not a plain concatenation."""
    if converter is None:
        return parts[None] if len(parts[None]) == 1 else None
    lists = [sorted(parts[p], key=dot_natural_key) for p in converter.source_patterns if p in parts]
    steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if steps == [(MergeModulelist, 0)] and len(lists) == 1:
        return lists[0]
    if steps == [(MergeModulelist, 0), (Concatenate, 1)] and len({len(names) for names in lists}) == 1:
        return [name for expert in zip(*lists, strict=True) for name in expert]  # per expert: gate rows, then up rows
    if steps == [(Concatenate, 0)]:
        return [name for names in lists for name in names]
    return None
