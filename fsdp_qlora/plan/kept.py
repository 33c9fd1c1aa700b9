"""What forward leaves for backward: on the device, or in host memory (``fsdp.offload=activations``); arithmetic only.

Only large tensors are moved (`fsdp_qlora.parallel.offload.MIN_BYTES`): small ones stay on the device, and in a small
model, or with short micro-batches, those are most of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fsdp_qlora.adapters.saved import Kept
from fsdp_qlora.attention.blocks import kept_scores
from fsdp_qlora.parallel.offload import LAYERS_ON_DEVICE, MIN_BYTES
from fsdp_qlora.plan.activations import LayerActivations
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.shapes.linears import FLOAT32, ModelShapes


@dataclass(frozen=True)
class Placed:
    """Bytes that one layer, or all of them, keep for backward, by where they are kept."""

    stays: int = 0
    """On the device."""
    leaves: int = 0
    """In host memory, and on the device while the layer or the next one runs."""
    again: int = 0
    """In host memory, as second copies of what the device holds once."""

    @property
    def on_host(self) -> int:
        """Bytes in host memory."""
        return self.leaves + self.again


class KeptActivations:
    """Adds up what decoder layers keep, for any batch and storage settings.

    Args:
        shapes: the model.
        layers: what each layer saves.
        adapters: what each adapter of a layer keeps in addition.
        trained: the numbers of elements of a layer's trained tensors.
    """

    on_device_at_once = LAYERS_ON_DEVICE
    """Layers whose offloaded activations are on the device together."""

    def __init__(
        self, shapes: ModelShapes, layers: Sequence[LayerActivations], adapters: Sequence[Kept], trained: Sequence[int]
    ) -> None:
        self._shapes, self._adapters, self._trained = shapes, adapters, trained
        self._kinds = list(dict.fromkeys(layers))
        self._kind_of = [self._kinds.index(layer) for layer in layers]

    def by_layer(self, settings: StorageSettings) -> list[Placed]:
        """Return what each layer keeps: its input, and without checkpointing everything that it saves."""
        of_kind = [self._kept(kind, settings) for kind in self._kinds]
        return [of_kind[kind] for kind in self._kind_of]

    def _kept(self, layer: LayerActivations, settings: StorageSettings) -> Placed:
        if settings.checkpointing == "none":
            return self._all_of(layer, settings)
        enters = split([self._edge(settings)], settings)
        # what selective checkpointing keeps is not saved by autograd, so it is not moved
        return Placed(enters.stays + self.chosen(layer, settings), enters.leaves)

    def _all_of(self, layer: LayerActivations, settings: StorageSettings) -> Placed:
        """Return everything that a layer saves. Its mask is expanded over the heads, and such tensors stay."""
        kept = split(self._tensors(layer, settings), settings)
        again = split([settings.tokens * layer.output_again], settings).leaves
        return Placed(kept.stays + _mask(layer, settings), kept.leaves, again)

    def on_device(self, settings: StorageSettings) -> int:
        """Return the bytes that forward leaves on the device, except what the last layer itself saves.

        (`plan` adds the last one.)
        """
        none = settings.checkpointing == "none"
        each = self.by_layer(settings)[: -1 if none else None]
        leaving = [kept.leaves for kept in each]
        # one mask for all layers, in bytes; each layer's copy of it is counted with the layer
        mask = settings.tokens * settings.max_length if settings.attention == "sdpa" and settings.restarting else 0
        return (
            sum(kept.stays for kept in each) + sum(leaving[-self.on_device_at_once :]) + mask
            + (self._edge(settings) if none else 0)
        )  # fmt: skip

    def last(self, settings: StorageSettings) -> Placed:
        """Return what the last layer saves beyond `on_device`."""
        return self.by_layer(settings)[-1] if settings.checkpointing == "none" else Placed()

    def all(self, settings: StorageSettings) -> Placed:
        """Return the sum over all layers."""
        each = self.by_layer(settings)
        return Placed(*(sum(getattr(kept, name) for kept in each) for name in ("stays", "leaves", "again")))

    def in_backward(self, settings: StorageSettings) -> int:
        """Return the bytes added by the layer in backward: recomputed activations and transient gradients."""

        def moments(layer: LayerActivations) -> int:
            in_attention = layer.attention_saved + layer.attention_scores * settings.max_length
            blocks = layer.blocks * settings.max_length * settings.micro_batch_size
            again = sum(self._tensors(layer, settings)) + _mask(layer, settings) - self.chosen(layer, settings)
            return max(again + max(layer.transient * settings.tokens, blocks), in_attention * settings.tokens)

        return max(map(moments, self._kinds), default=0)

    @property
    def fixed_length(self) -> bool:
        """Whether the model decides how long every row is."""
        return False

    def tokens_at_head(self, settings: StorageSettings) -> int:
        """Return the tokens that leave the last layer."""
        return settings.tokens

    def chosen(self, layer: LayerActivations, settings: StorageSettings) -> int:
        """Return the bytes of a layer's products that selective checkpointing keeps."""
        if settings.checkpointing != "selective":
            return 0
        # selective checkpointing keeps blockwise attention, with its probabilities, but not eager attention
        scores = sum(self._scores(settings)) if settings.attention != "eager" else 0
        return settings.tokens * layer.chosen + scores

    def _edge(self, settings: StorageSettings) -> int:
        return settings.tokens * self._shapes.hidden_size * settings.itemsize

    def _scores(self, settings: StorageSettings) -> list[int]:
        """Return the bytes of the probabilities that attention keeps; eager attention's also in float32."""
        itemsize = settings.itemsize
        scores = settings.tokens * kept_scores(self._shapes, settings.attention, itemsize, settings.max_length)
        if settings.attention != "eager":
            return [scores]
        softmax = scores * FLOAT32 // (itemsize + FLOAT32)
        return [softmax, scores - softmax]

    def _tensors(self, layer: LayerActivations, settings: StorageSettings) -> list[int]:
        """Return the bytes of every tensor that a layer saves, except `_mask`."""
        sizes = [settings.tokens * each for each in layer.tensors] + self._scores(settings)
        sizes.append(_by_position(layer, settings) - _mask(layer, settings))
        for fixed, a_token in (tensor for adapter in self._adapters for tensor in adapter.each):
            sizes.append((fixed + a_token * settings.tokens) * settings.itemsize)
        if settings.adapter_copies and settings.lora.dropout and settings.itemsize < FLOAT32:  # in compute dtype
            sizes += [count * settings.itemsize for count in self._trained]
        return sizes


def _by_position(layer: LayerActivations, settings: StorageSettings) -> int:
    return settings.tokens * layer.kept_positions * settings.max_length


def _mask(layer: LayerActivations, settings: StorageSettings) -> int:
    """Return the bytes of the mask that a layer saves for rows whose positions restart."""
    return _by_position(layer, settings) if settings.restarting else 0


def split(sizes: Iterable[int], settings: StorageSettings) -> Placed:
    """Divide tensors of these sizes by where they are kept; on a CPU, all are moved."""
    sizes = list(sizes)
    least = MIN_BYTES if settings.on_accelerator else 0
    leaves = sum(size for size in sizes if size >= least) if settings.offload_activations else 0
    return Placed(sum(sizes) - leaves, leaves)
