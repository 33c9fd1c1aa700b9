"""Accounts for every tensor in the files and every parameter and buffer of the model before anything is loaded.

Every tensor in the files must be loaded or be one that upstream ignores too; every parameter and buffer must be loaded
or be a buffer that upstream initializes itself. Otherwise the run is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.buffers import matches_any, persistent_buffers
from fsdp_qlora.load.conversions import arrangement
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.quant.bnb_state import STATE_SUFFIX

_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE_SUFFIX)
"""Suffixes of the tensors that bitsandbytes' 4-bit form stores alongside a weight."""
_SHOWN = 5


@dataclass(frozen=True)
class Inventory:
    """Tensors that are not simply loaded."""

    left_out: tuple[str, ...]
    """Tensors in the files that upstream does not load either."""
    copies: tuple[str, ...]
    """Second copies of tied weights."""
    made: frozenset[str]
    """Buffers that are not in the files; upstream's constructor initializes them."""
    drawn: tuple[str, ...] = ()
    """Parameters of a new head, which no file holds in this shape."""
    computed: tuple[str, ...] = ()
    """Parameters that upstream neither saves nor misses: its code computes them (Marian's sinusoidal positions)."""

    def describe(self) -> str | None:
        """Return one line about the tensors in the files that are not used; None if all are."""
        parts = []
        if self.left_out:
            parts.append(f"{len(self.left_out)} tensors that this model's code does not use ({_some(self.left_out)})")
        if self.copies:
            parts.append(f"{len(self.copies)} second copies of tied weights ({_some(self.copies)})")
        lines = [f"not loaded: {', '.join(parts)}"] if parts else []
        if self.drawn:
            lines.append(f"a new head, which is trained: {_some(self.drawn)} (in no file of this shape)")
        return "; ".join(lines) or None


def weights_of(model: PreTrainedModel, folder: Path) -> SafetensorsFolder:
    """Return the weights in ``folder``, under the names of ``model``, which is on meta.

    Raises:
        ModelError: if the files cannot be read.
    """
    files = SafetensorsFolder(folder)
    files.arrange(arrangement(model, files.entries))
    return files


def take_stock(
    model: PreTrainedModel, source: SafetensorsFolder, layers: Sequence[str] = (), new_head: bool = False,
    other_head: bool = False,
) -> Inventory:  # fmt: skip
    """Compare the names in the files with those of ``model``, as transformers built it, before any module is swapped.

    Also makes ``source`` find a tied weight under all of its names if the files hold it under any of them.

    Args:
        model: the model on meta.
        source: its files.
        layers: names of the model's repeated layers.
        new_head: whether the model may have another head than the files: then what lies outside the layers and the
            embedding may be in no file, or be left over, and what lies outside the base model may have another shape.
        other_head: whether the files may hold a head that the model lacks: what lies outside may be left over.

    Raises:
        ModelError: if tensors would be left over, parameters or buffers are in no file, or the files hold a tied
            pair twice with different values; the message names them.
    """
    first_names = dict(model.named_parameters())
    buffers = persistent_buffers(model)
    names = dict(model.named_parameters(remove_duplicate=False)).keys() | buffers.keys()
    groups = _tied_groups(model)
    there = {name for name in names if source.has(name)} - (_of_other_heads(model, source) if new_head else set())
    copies: list[str] = []
    for name in first_names:
        names_of_it = groups.get(name, [name])
        group = [other for other in names_of_it if other in there]
        for other in names_of_it if group else ():  # sharding gives each sharing module its own parameter
            if other not in there:
                source.alias(other, group[0])
        there.update(names_of_it if group else ())
        if len(group) > 1:
            _require_equal(source, group)
            copies += [other for other in group if other != name]
    lacking = [n for n in (*first_names, *buffers) if n not in there]
    made = frozenset(n for n in lacking if n in buffers and matches_any(n, model._keys_to_ignore_on_load_missing))
    computed = tuple(n for n in lacking if n in first_names and _upstream_computes(model, n))
    drawn = tuple(
        n for n in lacking if new_head and n in first_names and n not in computed and _is_outside(n, model, layers)
    )
    if refused := [n for n in lacking if n not in {*made, *drawn, *computed}]:
        raise ModelError(
            f"{source.folder}: no tensor {_some(refused)} among its {len(source.entries)} tensors"
            f"{f' ({len(refused)} are missing)' if len(refused) > 1 else ''}; {type(model).__name__} needs "
            f"{'it' if len(refused) == 1 else 'them'}. Download the model again, with its own config.json."
        )
    left_out = _left_out(
        model, source, names, _places(layers, model.base_model_prefix) if new_head or other_head else None
    )
    return Inventory(left_out, tuple(copies), made, drawn, computed)


def _left_out(
    model: PreTrainedModel, source: SafetensorsFolder, names: Collection[str], places: set[str] | None
) -> tuple[str, ...]:
    """Return the tensors of the files that the model does without.

    Args:
        model: the model.
        source: its files.
        names: the model's parameters and buffers.
        places: parts of names that say that a tensor lies in a layer, if what lies in none may be left out; else None.

    Raises:
        ModelError: if it should not do without them.
    """
    used = source.used() | set(names)
    left = [n for n in source.entries if n not in used and not _is_statistic(n, used)]
    left_out = tuple(
        n
        for n in left
        if _upstream_leaves_out(model, n) or (places is not None and not any(place in f".{n}" for place in places))
    )
    if odd := [n for n in left if n not in left_out]:
        raise ModelError(
            f"{source.folder}: {len(odd)} tensors are not used by {type(model).__name__}: {_some(odd)}. Either the "
            "weights and config.json do not match, or an option in the config (a bias, a tie) leaves them out; "
            "training would silently ignore them."
        )
    return left_out


def _upstream_computes(model: PreTrainedModel, name: str) -> bool:
    return all(
        matches_any(name, keys) for keys in (model._keys_to_ignore_on_load_missing, model._keys_to_ignore_on_save)
    )


def _of_other_heads(model: PreTrainedModel, source: SafetensorsFolder) -> set[str]:
    """Return the parameters outside the base model that the files hold in another shape: a head for other labels."""
    inside, stored = f"{model.base_model_prefix}.", source.entries
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(inside)}
    return {name for name, shape in own.items() if name in stored and tuple(stored[name].shape) != shape}


def _is_outside(name: str, model: PreTrainedModel, layers: Sequence[str]) -> bool:
    """Whether a parameter lies in no layer, and not in the embedding."""
    table = model.get_input_embeddings()
    embedding = {f"{path}." for path, module in model.named_modules() if module is table}
    return not name.startswith((*(f"{layer}." for layer in layers), *embedding))


def _places(layers: Sequence[str], prefix: str) -> set[str]:
    """Return the parts of names that say that a stored tensor lies in a layer: ``.encoder.layer.``."""
    return {f".{layer.removeprefix(prefix + '.').rpartition('.')[0]}." for layer in layers}


def _tied_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return, for each name of a parameter with several names, all of its names."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_parameter.values() if len(names) > 1 for name in names}


def _require_equal(source: SafetensorsFolder, names: list[str]) -> None:
    first, *others = names
    for other in others:
        if not source.looks_equal(first, other):
            raise ModelError(
                f"{source.folder}: config.json ties {first} and {other}, but the files hold two different tensors "
                "under these names. Set model.config_overrides.tie_word_embeddings=false to use both, or remove the "
                "one that is wrong."
            )


def _is_statistic(name: str, weights: Iterable[str]) -> bool:
    return any(name[: name.index(end)] in weights for end in _STATISTICS if end in name)


def _upstream_leaves_out(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers drops a tensor without a warning (`_adjust_missing_and_unexpected_keys` in v5)."""
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if name.endswith("rotary_emb.inv_freq") and any(b.endswith("rotary_emb.inv_freq") for b in buffers):
        return True
    if name.rpartition(".")[2] == "position_ids" and any(b.endswith("position_ids") for b in buffers):
        return True
    return matches_any(name, model._keys_to_ignore_on_load_unexpected)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
