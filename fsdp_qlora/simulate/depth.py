"""Cuts a model to fewer layers, and extrapolates the peaks of shallow models to the full depth.

Layers of one kind are identical, so the peak at a given place in the step (forward of the head, backward of the last
layer ...) is linear in the number of layers of each kind. Peaks at different places grow at different rates, so each is
extrapolated separately; the largest is the model's peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.simulate.tracker import TensorBytes

Counts = tuple[int, ...]
"""Number of layers of each kind."""
FIRST, CHECKED = 4, 4
"""Layers of a kind in the shallowest cut, and how many more the check has.

Fewer are not enough: with prefetched gathers and tensors in transit to the host, the first layers differ from the rest.
"""


@dataclass(frozen=True)
class Cut:
    """Peaks of a simulated model with the given numbers of layers, by place."""

    counts: Counts
    peaks: dict[str, TensorBytes]

    @property
    def total(self) -> int:
        """Bytes of the highest peak."""
        return max(peak.total for peak in self.peaks.values())


def _configs(base: PreTrainedModel) -> list[Any]:
    """Return the configs that say what layers are: the model's, and its decoder's (ModernBERT's is a linear)."""
    decoder = getattr(base.get_decoder(), "config", base.config)
    return list({id(config): config for config in (base.config.get_text_config(), decoder)}.values())


def _lists(base: PreTrainedModel, num_layers: int) -> Iterator[tuple[dict[str, Any], str, list[Any]]]:
    """Yield (config's values, key, list) for each list in a config with one entry per layer, like ``layer_types``."""
    for config in _configs(base):
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == num_layers:
                yield vars(config), key, list(value)


def layer_kinds(base: PreTrainedModel, shapes: ModelShapes) -> list[int]:
    """Return the kind of each decoder layer, numbered by first appearance; identical layers share a kind."""
    found: dict[Hashable, int] = {}
    lists = [values for _, _, values in _lists(base, len(shapes.layers))]
    kinds = []
    for i, name in enumerate(shapes.layers):
        layer = base.get_submodule(name)
        parameters = tuple((key, tuple(p.shape)) for key, p in layer.named_parameters())
        key = (type(layer), parameters, tuple(repr(values[i]) for values in lists))
        kinds.append(found.setdefault(key, len(found)))
    return kinds


def counts_of(kinds: Sequence[int]) -> Counts:
    """Return the number of layers of each kind."""
    found = Counter(kinds)
    return tuple(found[kind] for kind in range(len(found)))


def cut_counts(full: Counts) -> tuple[list[Counts], Counts]:
    """Return the cuts that determine the slopes (the shallowest first), and the one that checks them."""
    least = tuple(min(FIRST, n) for n in full)
    cuts = [least]
    for kind, n in enumerate(full):
        more = min(n, FIRST + CHECKED // 2)
        if more > least[kind]:
            cuts.append((*least[:kind], more, *least[kind + 1 :]))
    return cuts, tuple(min(FIRST + CHECKED, n) for n in full)


def kept_layers(kinds: Sequence[int], counts: Counts) -> list[int]:
    """Return the layers of a cut, in order: the first and the last ones of each kind."""
    kept: list[int] = []
    for kind, count in enumerate(counts):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        tail = count // 2
        kept += mine[: count - tail] + (mine[-tail:] if tail else [])
    return sorted(kept)


def cut_layers(base: PreTrainedModel, shapes: ModelShapes, kept: Sequence[int]) -> None:
    """Drop the layers of a meta model that are not ``kept``, from the model and from its config.

    An encoder-decoder has two lists of layers.

    Raises:
        PlanError: if there are layers outside such a list.
    """
    parents = [name.rpartition(".")[0] for name in shapes.layers]
    for parent in dict.fromkeys(parents):
        layers, (owner, _, child) = base.get_submodule(parent), parent.rpartition(".")
        mine = [i for i, other in enumerate(parents) if other == parent]
        if not isinstance(layers, nn.ModuleList) or len(layers) != len(mine):
            raise PlanError(
                f"plan.simulate: the layers of {type(base).__name__} are not in lists of their own ({parent}), so they "
                "cannot be cut; set it to false."
            )
        setattr(base.get_submodule(owner), child, nn.ModuleList(layers[i - mine[0]] for i in kept if i in mine))
    # Into the configs' own dicts: the config is briefly inconsistent, and its setters would reject that.
    for values, key, listed in _lists(base, len(shapes.layers)):
        values[key] = [listed[i] for i in kept]
    for config in _configs(base):
        vars(config)["num_hidden_layers"] = len(kept)


def relative_error(predicted: int, found: int, least: Counts, check: Counts, full: Counts, total: int) -> float:
    """Return the prediction error at the check's depth, scaled to full depth, relative to ``total`` bytes there."""
    layers, checked = sum(full) - sum(least), max(1, sum(check) - sum(least))
    return abs(predicted - found) * layers / checked / total


def extrapolate(cuts: Sequence[Cut], full: Counts) -> dict[str, TensorBytes]:
    """Extrapolate the peaks to ``full`` layers, from the shallowest cut and one more cut per kind."""
    least, *others = cuts
    found = dict(least.peaks)
    for cut in others:
        (kind,) = (k for k, n in enumerate(cut.counts) if n != least.counts[k])
        times = (full[kind] - least.counts[kind]) / (cut.counts[kind] - least.counts[kind])
        for place, peak in found.items():
            slope = cut.peaks[place].plus(least.peaks[place], -1)
            found[place] = peak.plus(slope, times)
    return found
