"""Writes one plain LoRA that is made of several with weights (``export what=adapter adapter={...}``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fsdp_qlora.adapters.based import fingerprint_in
from fsdp_qlora.adapters.combine import Weighted, combine, squares
from fsdp_qlora.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    opened_weights,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.method import of_target, scaling_of
from fsdp_qlora.adapters.names import IN_FILE, LORA_A, LORA_B
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.adapter import write_folder
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.load.fingerprint import Facts, agreed, differences
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.quant.formats import one_thread

_SUMMED = ("lora", "rslora")
"""Methods whose change of a weight is a product of two matrices."""


@dataclass(frozen=True)
class Combined:
    """What was written."""

    modules: int
    r: int
    """The largest rank."""
    num_bytes: int
    difference: float
    """How far its changes of weights are from the weighted sum of changes, relative to that sum (root mean square)."""


@dataclass(frozen=True)
class _Source:
    name: str
    folder: Path
    weight: float
    config: AdapterConfig
    lora: LoraSettings
    """With whole names of targets."""
    stored: Any
    """Its opened file of tensors."""

    def part(self, module: str) -> Weighted:
        down, up = (self._read(f"{IN_FILE}{module}{ending}") for ending in (LORA_A, LORA_B))
        return Weighted(down, up, self.weight * scaling_of(of_target(self.lora, module)))

    def _read(self, key: str) -> torch.Tensor:
        try:
            value = self.stored.get_tensor(key)
        except SafetensorError as error:
            raise ModelError(f"adapter: {self.folder / WEIGHTS_NAME} has no {key}.") from error
        require_finite(value, f"adapter: {key} in {self.folder}")
        return value.float()


def combine_adapters(
    folders: Mapping[str, Path], weights: Mapping[str, float], kind: str, target: Path, r: int = 0,
    overwrite: bool = False,
) -> Combined:  # fmt: skip
    """Write one plain PEFT adapter that stands for several of the same base, each times its weight.

    Args:
        folders: the adapters, by name: LoRA or rsLoRA, of any ranks, scalings and targets.
        weights: the weight of each; it may be negative.
        kind: ``linear``, ``cat`` or ``svd``, as PEFT's ``combination_type``.
        target: the folder to write. What lies beside the first adapter (tokenizer, chat template) is copied.
        r: the rank that ``svd`` keeps; 0 = the largest of the adapters'.
        overwrite: whether ``target`` may hold an earlier adapter, which is replaced as a whole.

    Raises:
        ModelError: if one is no such adapter, they are not of one base, or ``linear`` meets different ranks.
        StorageError: if the folder cannot be written.
    """
    with ExitStack() as stack, torch.no_grad(), one_thread():
        sources = [_open(name, folder, weights[name], stack) for name, folder in folders.items()]
        _require_one_base(sources)
        base = _base_of_all(sources)
        targets = [list(source.lora.target_modules) for source in sources]
        modules = sorted({name for names in targets for name in names})
        largest = r or max(of_target(s.lora, m).r for s, names in zip(sources, targets, strict=True) for m in names)
        tensors: dict[str, torch.Tensor] = {}
        ranks: dict[str, int] = {}
        whole = off = 0.0
        for module in modules:
            mine = [source for source, names in zip(sources, targets, strict=True) if module in names]
            parts = [source.part(module) for source in mine]
            _require_shapes(module, mine, parts, kind)
            down, up = made = combine(parts, kind, largest)
            of_sum, of_difference = squares(parts, made)
            whole, off = whole + of_sum, off + of_difference
            ranks[module] = len(down)
            for ending, value in ((LORA_A, down), (LORA_B, up)):
                require_finite(value, f"export.weights: {module} in {target}")
                tensors[f"{IN_FILE}{module}{ending}"] = value
    size = write_folder(sources[0].folder, target, tensors, _config(sources[0], ranks), base, overwrite)
    return Combined(len(modules), max(ranks.values()), size, sqrt(off / whole) if whole else 0.0)


def _open(name: str, folder: Path, weight: float, stack: ExitStack) -> _Source:
    config = read_adapter_config(folder)
    more = config.token_ids or config.modules or config.biases
    if config.variant not in _SUMMED or config.start is not None or more:
        what = f"is {config.start or config.variant}"
        what = "has rows of added tokens" if config.token_ids else "trained weights of the base" if more else what
        raise ModelError(f"adapter: {name} {what}; only adapters of {' and '.join(_SUMMED)} can be combined.")
    settings = config.settings(stored_modules(folder, config))
    stored = stack.enter_context(opened_weights(own_file(folder, WEIGHTS_NAME)))
    return _Source(name, folder, weight, config, settings, stored)


def _require_one_base(sources: Sequence[_Source]) -> None:
    first, *others = sources
    for other in others:
        one, two = first.config, other.config
        if (one.base_model, one.revision) != (two.base_model, two.revision):
            raise ModelError(
                f"adapter: {first.name} is for {one.base_model}{_at(one)}, and {other.name} for "
                f"{two.base_model}{_at(two)}; only adapters of one base can be combined."
            )


def _base_of_all(sources: Sequence[_Source]) -> Facts | None:
    """Return the fingerprint of the base of all, as far as they agree; None if one has none.

    Raises:
        ModelError: if two are of different weights.
    """
    prints = [fingerprint_in(source.folder) for source in sources]
    known = [(source.name, facts) for source, facts in zip(sources, prints, strict=True) if facts is not None]
    for (one, theirs), (other, ours) in combinations(known, 2):
        if odd := list(differences(theirs, ours, f"for {other}")):
            raise ModelError(
                f"adapter: {one} and {other} were trained on different bases: for {one}, {'; '.join(odd)}. Only "
                "adapters of one base can be combined."
            )
    return agreed([facts for _, facts in known]) if len(known) == len(sources) else None


def _at(config: AdapterConfig) -> str:
    return f" at revision {config.revision}" if config.revision else ""


def _require_shapes(module: str, sources: Sequence[_Source], parts: Sequence[Weighted], kind: str) -> None:
    for source, part in zip(sources, parts, strict=True):
        first = parts[0]
        if (len(part.up), part.down.shape[1]) != (len(first.up), first.down.shape[1]):
            raise ModelError(
                f"adapter: {module} is [{len(first.up)}, {first.down.shape[1]}] for {sources[0].name}, but "
                f"[{len(part.up)}, {part.down.shape[1]}] for {source.name}: they are of different bases."
            )
        if kind == "linear" and len(part.down) != len(first.down):
            raise ModelError(
                f"export.combination: linear adds matrices of one rank, but {module} has rank {len(first.down)} in "
                f"{sources[0].name} and {len(part.down)} in {source.name}; choose cat or svd."
            )


def _config(first: _Source, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return PEFT's config of an adapter with these ranks, by module, and scaling 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != r}
    values = read_json(own_file(first.folder, CONFIG_NAME))
    chosen = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return values | chosen | {
        "target_modules": sorted(ranks), "r": r, "lora_alpha": r, "use_rslora": False, "init_lora_weights": True,
        "rank_pattern": others, "alpha_pattern": others, "inference_mode": True,
    }  # fmt: skip
