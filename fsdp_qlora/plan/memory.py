"""Bytes a rank holds, by kind and by moment of a step; arithmetic only.

Parameters, statistics, adapters and optimizer states are exact. Gradients, activations, logits and gathered units are
computed for the moment at which FSDP2 and autograd hold most. Fragmentation, CUDA's context and NCCL's buffers are left
to the reserve. The kinds do not peak at the same time, so the planned peak is the largest of four moments, not the sum:

- ``first_layer``: FSDP2 keeps a unit's receive buffer until the next unit is copied out of its own, so the embedding's
  buffer is still alive next to the first layer's;
- ``head``: the head is gathered, a chunk of logits exists, and everything that forward keeps for backward is alive;
- ``layer_backward``: a layer is gathered (and the next one prefetched), recomputed and differentiated;
- ``update``: the optimizer step.

Where a vision tower reads images (`plan/images.py`), two more: ``images``, while it computes, and ``images_backward``,
if it is trained. The root unit, to which it belongs, is gathered at all of them but ``update``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

from fsdp_qlora.adapters.names import base_name
from fsdp_qlora.distributed.shards import fullest_share
from fsdp_qlora.heads.costs import chunked_bytes, sliced_bytes
from fsdp_qlora.optim.sizes import state_bytes, temporary_bytes
from fsdp_qlora.plan.activations import LayerActivations, layer_activations
from fsdp_qlora.plan.counted import AdapterCost, BytesPerRank, HostBytes, MemoryPlan, Unit
from fsdp_qlora.plan.dense import DenseWeights
from fsdp_qlora.plan.images import TowerMemory, outside_units
from fsdp_qlora.plan.kept import KeptActivations
from fsdp_qlora.plan.offloaded import most_inside
from fsdp_qlora.plan.run_layers import RunActivations
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.quant.packing import CHUNK_WEIGHTS
from fsdp_qlora.shapes.linears import FLOAT32, ModelShapes

FILE_ITEMSIZE = 2
"""Bytes per element in the model's files (bf16)."""


class MemoryModel:
    """A model's fixed bytes, computed once; `plan` then adds up memory for any batch and storage settings.

    Args:
        shapes: the model.
        quantized: the weights that are stored quantized.
        trained: the tensors of each adapted linear: its name -> name in PEFT's file -> shape.
        offloaded: parameters that stay in host memory in float32.
        adapters: what adapters cost beyond ``trained``.
        settings: the storage settings. `plan` may be called with other values of ``micro_batch_size``, ``max_length``,
            ``checkpointing``, ``logits_chunk``, ``offload_*``, ``prefetch``, ``reshard_after_forward``,
            ``cache_dequantized`` and ``accumulation_steps``.
    """

    def __init__(
        self,
        shapes: ModelShapes,
        quantized: Iterable[Packed],
        trained: Mapping[str, Mapping[str, tuple[int, ...]]],
        settings: StorageSettings,
        offloaded: frozenset[str] = frozenset(),
        adapters: AdapterCost = AdapterCost(),  # noqa: B008 (frozen)
    ) -> None:
        self.shapes, self.settings, self.offloaded, self.adapters = shapes, settings, offloaded, adapters
        layers = tuple(layer + "." for layer in shapes.layers)
        self.offloaded_inside = frozenset(name for name in offloaded if name.startswith(layers))
        self.trained = trained
        self.masters = shapes.parameters.keys() & {base_name(name) for tensors in trained.values() for name in tensors}
        quantized, edges = tuple(quantized), (shapes.embedding, shapes.head)
        self.packed = {x.linear.parameter: x for x in quantized}
        inside = [x for x in quantized if x.linear.name not in edges]
        self.dense = DenseWeights.of(inside, trained, settings.on_accelerator)
        self.host_shards = {
            name: FLOAT32 * fullest_share(shape[0], settings.shard_size) * prod(shape[1:])
            for name, shape in shapes.parameters.items()
            if name in offloaded
        }
        self.fixed, self.largest_slice = self._fixed(settings), self._largest_slice(settings.shard_size)
        self.layers = tuple(self._unit(name, lambda of, name=name: of.startswith(f"{name}.")) for name in shapes.layers)
        edges = (shapes.embedding, shapes.head) if shapes.edges_apart else ()
        self.edges = tuple(self._unit(name, lambda of, name=name: of.startswith(f"{name}.")) for name in edges)
        if not shapes.edges_apart:  # all outside the layers is one unit, the root
            self.edges = (self._unit("", lambda of: not of.startswith(layers)),)
        adapted = frozenset(trained) - self.adapters.no_input
        more = (settings.lora.dropout > 0, settings.attention, settings.restarting, settings.on_accelerator)
        self.activations: tuple[LayerActivations, ...] = tuple(
            layer_activations(shapes, layer, adapted, settings.itemsize, *more) for layer in shapes.layers
        )
        self.tower = TowerMemory(shapes, trained, adapters.beside)
        self.root = self._root()
        self.kept = (
            RunActivations(shapes, adapters.kept, self._most_trained(), adapted)
            if shapes.runs
            else KeptActivations(shapes, self.activations, adapters.kept, self._most_trained())
        )

    def plan(self, settings: StorageSettings) -> MemoryPlan:
        """Return the memory of the rank that holds most, with these settings."""
        fixed = self.fixed
        until_backward = settings.cache_dequantized and not settings.keeps_dense
        calls = max((run.calls for run in self.shapes.runs), default=1)  # each keeps dense weights of its own
        kept = self.kept.on_device(settings) + (calls * self.dense.kept * settings.itemsize if until_backward else 0)
        layer = self.kept.in_backward(settings)
        # `kept` leaves out the last layer's activations: `layer` counts them in backward, and `last` at the head. Those
        # that are moved to the host are on the device for two layers at a time, which `kept` counts.
        last = self.kept.last(settings).stays
        logits = self._logits(settings)
        # five tensors [tokens, hidden] around the head: the final norm, its copies and the gradient
        width = 5 * self.shapes.hidden_size + self.adapters.kept_by_head
        edge = self.kept.tokens_at_head(settings) * width * settings.itemsize
        edge += self.tower.held(settings)
        head, again = self._gathered_head(settings)
        at_layer = self._gathered(self.layers, settings)
        at_layer += (self.dense.product_kept if settings.keeps_dense else self.dense.product) * settings.itemsize
        apart = settings.on_accelerator and settings.shard_size == 1 and not settings.offload_parameters
        later = any(not name.startswith(f"{self.shapes.embedding}.") for name in self.offloaded)
        ahead = settings.prefetch if apart and later else 0  # `copy_modules_ahead` (`parallel/copy_ahead.py`)
        inside_ahead = ahead * most_inside(self.offloaded_inside, self.shapes) * settings.itemsize
        root = self._gathered_root(settings)
        at_layer += self._held_edges(settings) + inside_ahead + root
        gradients = self._gradients(settings)
        dense = self.dense.kept * settings.itemsize if settings.keeps_dense else 0
        on_device = 0 if settings.offload_parameters else sum(fixed) + dense
        arriving, inside = self._arriving(settings)
        reads = self.tower.pixels(settings) + self.tower.saved(settings)
        before_layers = on_device + gradients + reads
        held = before_layers + kept
        # a head copied ahead has arrived before the last layer's activations are there, and is beside that layer
        arrives, before = (again + at_layer, again + arriving + at_layer) if ahead else (again + arriving, 0)
        # the layer in backward is one of those whose offloaded activations are on the device
        left = min(kept, self.kept.last(settings).leaves)
        # gradients and the optimizer's temporaries; of adapters, at most three times their bytes (fixed[3])
        updated = fixed[3] + temporary_bytes(settings.optim, fixed[3], settings.on_accelerator)
        moments = {
            "first_layer": before_layers + self._gathered_first(settings) + arriving + root + self.tower.held(settings),
            "head": held + root + self._held_layers(settings) + max(last + edge + max(logits + head, arrives), before),
            "layer_backward": held - left + layer + at_layer + inside,
            "update": 0 if settings.offload_parameters else on_device + (updated if self.masters else 3 * fixed[3]),
        }
        moments |= self._images(settings, before_layers)
        if self.adapters.loading:
            moments["loading"] = (0 if settings.offload_parameters else sum(fixed[:4])) + self.adapters.loading
        packed, statistics, base, adapters, optimizer = (0,) * 5 if settings.offload_parameters else fixed
        bytes_ = BytesPerRank(
            packed, statistics, base, dense, adapters, self._reduced(settings, gradients), optimizer,
            kept + reads + max(layer - left, last + edge, self._reading(settings)), logits,
            max(head + root, again + root, at_layer),
        )  # fmt: skip
        return MemoryPlan(bytes_, moments, self._host(settings))

    def _reduced(self, settings: StorageSettings, gradients: int) -> int:
        """Return the bytes of ``gradients`` while they are reduced.

        The all-reduce copies all gradients into one tensor, with a count for each A and B (`adapters/replicated.py`).
        It runs when activations are freed, so it counts in `bytes` but in none of the moments.
        """
        if settings.adapter_copies > 1:
            return 2 * gradients + FLOAT32 * (sum(map(len, self.trained.values())) + len(self.adapters.rows))
        if settings.shard_size > 1:
            return gradients + FLOAT32 * (self.adapters.row_elements + len(self.adapters.rows))
        return gradients

    @property
    def one_edge(self) -> bool:
        """Whether embedding and head are in one unit: tied, or in the root."""
        return self.shapes.tied or not self.shapes.edges_apart

    def trainable(self) -> int:
        """Return the number of trainable (adapter) elements."""
        return self.adapters.row_elements + sum(prod(s) for shapes in self.trained.values() for s in shapes.values())

    def _fixed(self, settings: StorageSettings) -> tuple[int, int, int, int, int]:
        """Return this rank's bytes of packed weights, statistics, kept weights, adapters and optimizer states."""
        shard = settings.shard_size
        rows = [(x, fullest_share(x.rows, shard)) for x in self.packed.values()]
        kept = sum(
            fullest_share(shape[0] if shape else 1, shard) * prod(shape[1:])
            for name, shape in self.shapes.parameters.items()
            if name not in {*self.packed, *self.offloaded, *self.shapes.float32, *self.masters}
        )
        adapters = FLOAT32 * self.held(settings)
        return (
            sum(mine * x.row_bytes for x, mine in rows),
            sum(mine * x.quant_format.statistics_bytes for x, mine in rows),
            kept * settings.itemsize + self.shapes.float32_bytes + self.adapters.fixed,
            adapters,
            sum(
                state_bytes(settings.optim, name, shape, num_ranks=settings.adapter_shards)
                for shapes in self.trained.values()
                for name, shape in shapes.items()
            )
            + sum(state_bytes(settings.optim, name, shape, num_ranks=1) for name, shape in self.adapters.rows.items()),
        )

    def _most_trained(self) -> list[int]:
        """Return the number of elements of each trained tensor in the layer that has most of them."""
        inside = [
            [prod(shape) for name, shapes in self.trained.items() if name.startswith(f"{layer}.") for shape in
             shapes.values()] for layer in self.shapes.layers
        ]  # fmt: skip
        return max(inside, key=sum, default=[])

    def held(self, settings: StorageSettings) -> int:
        """Return the number of adapter elements that this rank holds."""
        shards, shapes = settings.adapter_shards, (s for tensors in self.trained.values() for s in tensors.values())
        return sum(fullest_share(s[0], shards) * prod(s[1:]) for s in shapes) + self.adapters.row_elements

    def _gradients(self, settings: StorageSettings) -> int:
        """Return the bytes of the adapters' float32 gradients: whole during accumulation, else this rank's shard."""
        if self.masters and not settings.adapter_copies:  # reduced after each micro-batch; a unit's are whole before it
            one_unit = max(unit.adapters for unit in self._units())
            return FLOAT32 * self.held(settings) + (FLOAT32 + settings.itemsize) * one_unit
        if settings.accumulation_steps > 1 or settings.adapter_copies:
            return FLOAT32 * self.trainable()
        # before it is reduce-scattered, the gradient of one layer exists whole
        one_unit = max(unit.adapters for unit in self._units()) if settings.shard_size > 1 else 0
        return FLOAT32 * ((0 if settings.offload_parameters else self.held(settings)) + one_unit)

    def _unit(self, prefix: str, inside: Callable[[str], bool]) -> Unit:
        """Return the unit of the parameters and adapters whose names ``inside`` accepts."""
        total = 0
        for name, shape in self.shapes.parameters.items():
            if inside(name) and name not in self.shapes.float32 and name not in self.masters:
                packed = self.packed.get(name)
                total += prod(shape) * self.settings.itemsize if packed is None else packed.bytes
        tensors = (shapes for name, shapes in self.trained.items() if inside(f"{name}."))
        trained = sum(prod(shape) for shapes in tensors for shape in shapes.values())
        return Unit(prefix, total + (0 if self.settings.adapter_copies else trained * self.settings.itemsize), trained)

    def _units(self) -> tuple[Unit, ...]:
        return (*self.layers, *self.edges, self.root)

    def _root(self) -> Unit:
        """Return what a vision tower adds to the root unit, which is small without one."""
        if self.shapes.tower is None:
            return Unit("", 0, 0)
        outside = outside_units(self.shapes)
        names = {*outside, *(f"{name.rpartition('.')[0]}." for name in outside)}
        return self._unit("", names.__contains__)

    def _gathered_root(self, settings: StorageSettings) -> int:
        """Return the bytes of the root unit, which stays gathered from forward to the end of backward."""
        return 0 if settings.keeps_whole else self.root.gathered

    def _reading(self, settings: StorageSettings) -> int:
        """Return the bytes that a vision tower takes while it computes, beside what it keeps for backward."""
        return self.tower.held(settings) + self.tower.in_forward(settings)

    def _images(self, settings: StorageSettings, held: int) -> dict[str, int]:
        """Return the moments of a vision tower's forward and backward; ``held`` is alive at both."""
        if self.shapes.tower is None:
            return {}
        root, dense = self._gathered_root(settings), self.dense.product * settings.itemsize
        first = 0 if settings.keeps_whole else self.edges[0].gathered  # gathered, or received, just before
        received = root + (first if self.shapes.tied or settings.edges_stay else 0) if settings.shard_size > 1 else 0
        moments = {"images": held + self._reading(settings) + root + received + first + dense}
        if self.tower.trained:
            edges = self._held_edges(settings) + self._held_layers(settings)
            moments["images_backward"] = held + self.tower.in_backward(settings) + root + edges + dense
        return moments

    def _gathered(self, units: Sequence[Unit], settings: StorageSettings) -> int:
        """Return the gathered bytes while one of ``units`` computes: that unit and the buffers of prefetched ones."""
        largest = max((unit.gathered for unit in units), default=0)
        if settings.shard_size == 1:  # FSDP copies a unit even on a single rank
            ahead = settings.copied_ahead if units is self.layers else 0
            return 0 if settings.keeps_whole else largest * (1 + ahead)
        if units is self.layers and not settings.reshard_after_forward:
            return self._held_layers(settings) + largest
        # the next layers are gathered ahead; an edge is not, but its receive buffer is alive beside it
        return largest * (1 + settings.prefetch if units is self.layers else 2)

    def _arriving(self, settings: StorageSettings) -> tuple[int, int]:
        """Return the bytes that a shard's copy from host memory takes until it is gathered: of edges, and in layers.

        They count on a single rank only: elsewhere a shard is no larger than the receive buffer, which comes later.
        """
        if settings.shard_size > 1:
            return 0, 0
        if settings.offload_parameters:
            return self._gathered(self.edges, settings), 0
        sizes: dict[bool, list[int]] = {True: [0], False: [0]}
        for name, size in self.host_shards.items():
            sizes[name in self.offloaded_inside].append(size)
        return max(sizes[False]), max(sizes[True])

    def _held_layers(self, settings: StorageSettings) -> int:
        """Return the bytes of layers that stay gathered from forward to backward."""
        return sum(unit.gathered for unit in self.layers) if settings.layers_stay else 0

    def _held_edges(self, settings: StorageSettings) -> int:
        """Return the bytes of the embedding and the head that are gathered while layers compute their backward."""
        if self.one_edge:  # freed only at the end of backward
            return 0 if settings.keeps_whole else self.edges[0].gathered
        return sum(unit.gathered for unit in self.edges) if settings.edges_stay else 0

    def _gathered_head(self, settings: StorageSettings) -> tuple[int, int]:
        """Return the gathered bytes while logits exist, and while the head is gathered again for backward."""
        if not self.shapes.edges_apart:
            return self._gathered_with_head(settings)
        again = self._gathered(self.edges, settings)
        if not self.shapes.tied or settings.shard_size == 1:
            again += self.edges[0].gathered if settings.edges_stay else 0
            return again, again
        # a tied unit stays gathered from the embedding on; the receive buffer of the last layer is still alive
        return self.edges[0].gathered + max((u.gathered for u in self.layers), default=0), again

    def _gathered_with_head(self, settings: StorageSettings) -> tuple[int, int]:
        """Return `_gathered_head` where embedding and head belong to the root, which stays gathered for backward.

        When the last layer computes in forward, it and its receive buffer are there; its buffer outlives it.
        """
        root = 0 if settings.keeps_whole else self.edges[0].gathered
        last = 0 if settings.keeps_whole or not self.layers else self.layers[-1].gathered
        there = settings.shard_size == 1 or settings.layers_stay  # or it is counted with those that stay
        return root + last * (1 if there else 2), root

    def _gathered_first(self, settings: StorageSettings) -> int:
        """Return the gathered bytes when the first layer follows the embedding.

        Each counts twice if both its receive buffer and its gathered parameters are alive: the first layer, and a tied
        embedding, which stays gathered for the head. Of an untied embedding that does not stay, only the receive buffer
        is left.
        """
        if settings.keeps_whole:
            return 0
        if settings.shard_size == 1 or not self.layers:
            return self.edges[0].gathered
        stays = self.one_edge or settings.edges_stay
        return self.edges[0].gathered * (2 if stays else 1) + 2 * self.layers[0].gathered

    def _logits(self, settings: StorageSettings) -> int:
        tokens = self.kept.tokens_at_head(settings)
        chunk, vocab = min(settings.logits_chunk, tokens), self.shapes.vocab_size + self.adapters.added
        if settings.quantized_head:
            return sliced_bytes(chunk, tokens, vocab, self.shapes.hidden_size, settings.itemsize)
        kinds = self.shapes.capped, self.shapes.by_code
        return chunked_bytes(chunk, vocab, settings.itemsize, settings.on_accelerator, *kinds)

    def _largest_slice(self, shard_size: int) -> int:
        """Return the most elements that this rank reads at a time: a chunk (all if transposed) or its shard."""
        largest = 0
        for name, shape in self.shapes.parameters.items():
            if (packed := self.packed.get(name)) is not None:
                chunk = max(CHUNK_WEIGHTS, packed.quant_format.row_weights(packed.linear.in_features))
                whole = packed.linear.numel_each if packed.linear.transposed else chunk
                largest = max(largest, min(whole, prod(shape)))
            else:
                largest = max(largest, fullest_share(shape[0] if shape else 1, shard_size) * prod(shape[1:]))
        return largest

    def _host(self, settings: StorageSettings) -> HostBytes:
        offloaded = self.kept.all(settings).on_host
        parameters = sum(self.host_shards.values())
        if settings.offload_parameters:  # reduced gradients come as the activations go; an update is after both
            reduced = self.fixed[3] + temporary_bytes(settings.optim, self.fixed[3])
            parameters += sum(self.fixed) + max(0, reduced - offloaded)
        return HostBytes(self.largest_slice * FILE_ITEMSIZE, parameters, offloaded)
