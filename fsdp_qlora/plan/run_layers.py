"""What layers leave for backward if they were run on meta (`fsdp_qlora.model.runs`), for any batch and settings.

Layers may differ in everything: an encoder-decoder's sides see other lengths, and an image model's stages have other
widths. So what each adds is summed in the order of the forward, and the peak of backward is that of the layer at which
most is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from fsdp_qlora.adapters.saved import Kept
from fsdp_qlora.plan.kept import KeptActivations, Placed, split
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.shapes.linears import FLOAT32, ModelShapes
from fsdp_qlora.shapes.runs import ByLength, LayerRun


class RunActivations(KeptActivations):
    """Adds up what layers keep that were run.

    Args:
        shapes: the model, with `ModelShapes.runs`.
        adapters: what each adapter of a layer keeps in addition.
        trained: the numbers of elements of a layer's trained tensors.
        adapted: names of the linears whose adapters keep the linear's input.
    """

    def __init__(
        self, shapes: ModelShapes, adapters: Sequence[Kept], trained: Sequence[int], adapted: frozenset[str]
    ) -> None:
        super().__init__(shapes, (), adapters, trained)
        self._runs = shapes.runs
        self._inputs = [list(read.values()) for read in _inputs_of(shapes.runs, adapted)]

    def by_layer(self, settings: StorageSettings) -> list[Placed]:
        """Return what each layer keeps: its input, and without checkpointing everything that it saves."""
        if settings.checkpointing == "none":
            return [split(sizes, settings) for sizes in self._sizes(settings)]
        return [
            Placed(enters.stays + self._chosen(run, settings) + _bytes(run.shared, settings), enters.leaves)
            for run in self._runs
            for enters in (split([_bytes(run.enters, settings)], settings),)
        ]

    def on_device(self, settings: StorageSettings) -> int:
        """Return the bytes that forward leaves on the device, except what the last layer itself saves."""
        none = settings.checkpointing == "none"
        kept = self.by_layer(settings)[: -1 if none else None]
        edge = _bytes(self._runs[-1].enters, settings) if none else 0
        return sum(each.stays for each in kept) + sum(each.leaves for each in kept[-self.on_device_at_once :]) + edge

    def in_backward(self, settings: StorageSettings) -> int:
        """Return the bytes that backward needs at its peak, in whichever layer that is, beyond `on_device`."""
        none, kept = settings.checkpointing == "none", self.by_layer(settings)
        held = [0, *accumulate(each.stays for each in kept)]
        peaks = []
        for at, (run, sizes) in enumerate(zip(self._runs, self._sizes(settings), strict=True)):
            inside = sum(sizes) + _bytes(run.transient, settings) - self._chosen(run, settings)
            peaks.append(held[at if none else at + 1] + inside)
        return max(peaks) - (held[-2] if none else held[-1])

    @property
    def fixed_length(self) -> bool:
        """Whether the model decides how long every row is: images, recordings."""
        return not self._runs[0].tokens.linear

    def tokens_at_head(self, settings: StorageSettings) -> int:
        """Return the tokens that leave the last layer."""
        return _bytes(self._runs[-1].tokens, settings)

    def _chosen(self, run: LayerRun, settings: StorageSettings) -> int:
        return _bytes(run.products, settings) if settings.checkpointing == "selective" else 0

    def _sizes(self, settings: StorageSettings) -> list[list[int]]:
        """Return the bytes of every tensor that each layer saves."""
        layers = []
        for run, inputs in zip(self._runs, self._inputs, strict=True):
            sizes = [_bytes(each, settings) for each in (*run.tensors, *inputs)]
            tokens = _bytes(run.tokens, settings)
            for fixed, a_token in (tensor for adapter in self._adapters for tensor in adapter.each):
                sizes.append((fixed + a_token * tokens) * settings.itemsize)
            if settings.adapter_copies and settings.lora.dropout and settings.itemsize < FLOAT32:  # in compute dtype
                sizes += [count * settings.itemsize for count in self._trained]
            layers.append(sizes)
        return layers


def _inputs_of(runs: Iterable[LayerRun], adapted: frozenset[str]) -> list[dict[int, ByLength]]:
    """Return, for each layer, the inputs that its adapters keep and no earlier layer's do, by their numbers."""
    seen: set[int] = set()
    layers = []
    for run in runs:
        read = {number: size for linear, (number, size) in run.inputs.items() if linear in adapted}
        layers.append({number: size for number, size in read.items() if number not in seen})
        seen |= read.keys()
    return layers


def _bytes(each: ByLength, settings: StorageSettings) -> int:
    """Return a number of all rows of a micro-batch."""
    return settings.micro_batch_size * each.at(settings.max_length)
