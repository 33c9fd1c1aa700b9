"""Every tensor of the files and every parameter and buffer of the model, accounted for before anything is loaded.

A tensor of the files is loaded into something, or is one that upstream itself leaves out, or the run is refused; a
parameter or buffer is loaded, or is one that upstream makes itself, or the run is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.buffers import matches_any, persistent_buffers
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.quant.bnb_state import STATE_SUFFIX

_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE_SUFFIX)
"""What bitsandbytes' 4-bit form keeps beside a weight: the weight's name, then one of these."""
_SHOWN = 5


@dataclass(frozen=True)
class Inventory:
    """What is not simply loaded."""

    left_out: tuple[str, ...]
    """Tensors of the files that upstream's code does not load either."""
    copies: tuple[str, ...]
    """Second copies of tied weights."""
    made: frozenset[str]
    """Buffers that the files lack and upstream's constructor makes."""

    def describe(self) -> str | None:
        """Return one line on what of the files is not used, None where all is."""
        parts = []
        if self.left_out:
            parts.append(f"{len(self.left_out)} tensors that this model's code does not use ({_some(self.left_out)})")
        if self.copies:
            parts.append(f"{len(self.copies)} second copies of tied weights ({_some(self.copies)})")
        return f"not loaded: {', '.join(parts)}" if parts else None


def take_stock(model: PreTrainedModel, source: SafetensorsFolder) -> Inventory:
    """Compare the names in the files with those of ``model``, as transformers built it, before anything is swapped.

    Let a tied weight that the files hold under its other name be found under the first.

    Raises:
        ModelError: naming tensors that would be left over, or parameters and buffers that no file holds; or a tied
            pair that the files hold twice with different values.
    """
    first_names = dict(model.named_parameters())
    buffers = persistent_buffers(model)
    names = dict(model.named_parameters(remove_duplicate=False)).keys() | buffers.keys()
    groups = _tied_groups(model)
    there = {name for name in names if source.has(name)}
    copies: list[str] = []
    for name in first_names:
        names_of_it = groups.get(name, [name])
        group = [other for other in names_of_it if other in there]
        for other in names_of_it if group else ():  # sharding gives each module that shares it a parameter of its own
            if other not in there:
                source.alias(other, group[0])
        there.update(names_of_it if group else ())
        if len(group) > 1:
            _require_equal(source, group)
            copies += [other for other in group if other != name]
    lacking = [n for n in (*first_names, *buffers) if n not in there]
    made = frozenset(n for n in lacking if n in buffers and matches_any(n, model._keys_to_ignore_on_load_missing))
    if refused := [n for n in lacking if n not in made]:
        raise ModelError(
            f"{source.folder}: no tensor {_some(refused)} among its {len(source.entries)} tensors"
            f"{f' ({len(refused)} are missing)' if len(refused) > 1 else ''}; {type(model).__name__} needs "
            f"{'it' if len(refused) == 1 else 'them'}. Download the model anew, with its own config.json."
        )
    used = source.used() | names
    left = [n for n in source.entries if n not in used and not _is_statistic(n, used)]
    left_out = tuple(n for n in left if _upstream_leaves_out(model, n))
    if odd := [n for n in left if n not in left_out]:
        raise ModelError(
            f"{source.folder}: {len(odd)} tensors are used by nothing in {type(model).__name__}: {_some(odd)}. Weights "
            "and config.json do not belong together, or a switch of the config (a bias, a tie) leaves them out; "
            "training would silently go without them."
        )
    return Inventory(left_out, tuple(copies), made)


def _tied_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return, for each parameter that has several names, all of them."""
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
