"""Which of the files' tensors make up each tensor of the model, by transformers' own conversion mapping.

Checkpoints keep each expert by itself, leave out a prefix, split or transpose what the model stacks. Where whole
tensors are laid end to end, a rank still reads just its own stretch. Any other conversion is upstream's own code, run
on the whole tensors it needs, one conversion at a time: slower to load, never guessed.
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
"""Reads a whole tensor of the files."""


@dataclass(frozen=True)
class Conversion:
    """Tensors of the files that upstream's code makes into one or several of the model's."""

    target: str
    """First of the tensors that it makes."""
    converter: WeightConverter
    parts: tuple[tuple[str, str], ...]
    """``(name in the files, pattern that it matched)``, in order."""
    model: PreTrainedModel

    def run(self, read: Read) -> dict[str, torch.Tensor]:
        """Return the tensors that it makes, by their names in the model."""
        converter = deepcopy(self.converter)
        for name, pattern in self.parts:
            converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Arrangement:
    """How the model's tensors come out of the files, for all that are not stored under their own names."""

    end_to_end: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name in the model -> names in the files, in the order in which they lie."""
    converted: Mapping[str, Conversion] = field(default_factory=dict)
    """Name in the model -> the conversion that makes it."""


def arrangement(model: PreTrainedModel, stored: Iterable[str]) -> Arrangement:
    """Return where the tensors of ``model`` come from that the files hold under other names or in other shapes.

    Args:
        model: as transformers builds it, on meta, nothing swapped yet.
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
    found: dict[str | None, list[str]] = {}
    for name, pattern in parts:
        found.setdefault(pattern, []).append(name)
    return found


def _targets(conversion: Conversion, wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the tensors of the model that a conversion makes: those named as its target is, by its other patterns."""
    first, *others = conversion.converter.target_patterns
    plain = first.replace("\\", "").strip("^$")
    names = [conversion.target.replace(plain, other.replace("\\", "").strip("^$")) for other in others]
    return [conversion.target, *(name for name in names if name in wanted)]


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
