"""Bytes a rank holds, by kind; arithmetic only.

Parameters, statistics, adapters, gradients and optimizer states are exact. Activations, logits and gathers are upper
estimates of what a step adds (the measured peak is printed beside them at the end of `train`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod

from fsdp_qlora.plan.layout import ROW_BLOCKS, ROW_BYTES, LinearShape, ModelShapes, row_range

FLOAT32 = 4
PARAMETER_KINDS = ("base_packed", "base_statistics", "base_kept", "adapters", "gradients", "optimizer")
"""Kinds that ``fsdp.offload=params`` keeps in host memory."""
_LAYERS_ON_DEVICE = 2
"""Layers whose kept activations are on the device at a time with ``fsdp.offload=activations``."""


@dataclass(frozen=True)
class BytesPerRank:
    """Bytes of the fullest rank."""

    base_packed: int
    base_statistics: int
    base_kept: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gather: int
    host_parameters: bool = False
    """Whether `PARAMETER_KINDS` lie in host memory, not on the device."""
    host_activations: int = 0
    """Bytes of activations in host memory; ``activations`` are those on the device."""

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind, wherever they lie (activations: those on the device)."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("host_")}

    @property
    def total(self) -> int:
        """Sum of what is on the device: the planned peak."""
        return sum(v for k, v in self.kinds.items() if not (self.host_parameters and k in PARAMETER_KINDS))

    @property
    def host(self) -> int:
        """Sum of what is offloaded to host memory."""
        return sum(self.kinds.values()) - self.total + self.host_activations


@dataclass(frozen=True)
class StorageSettings:
    """What decides the bytes."""

    shard_size: int
    quantized: bool
    double_quant: bool
    itemsize: int
    """Bytes of an unquantized base element and of an activation: 2 (bf16) or 4 (fp32)."""
    r: int
    optimizer_states: int
    """Float32 states per trainable element."""
    micro_batch_size: int
    max_length: int
    checkpointing: bool
    eager_attention: bool
    logits_chunk: int
    offload_parameters: bool = False
    offload_activations: bool = False
    prefetch: int = 1
    """Units gathered ahead."""


def _share(dim0: int, shard_size: int) -> int:
    return row_range(dim0, 0, shard_size)[1]


def statistics_bytes(rows: int, double_quant: bool) -> int:
    """Return the bytes of statistics of packed rows: uint8 and one float32 a row, or a float32 a block."""
    return rows * (ROW_BLOCKS + FLOAT32 if double_quant else ROW_BLOCKS * FLOAT32)


def lora_shapes(linear: LinearShape, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B."""
    return (r, linear.in_features), (linear.out_features, r)


def bytes_per_rank(
    shapes: ModelShapes, quantized: Iterable[LinearShape], targets: Iterable[LinearShape], settings: StorageSettings
) -> BytesPerRank:
    """Return the bytes that the fullest rank holds during a training step."""
    quantized, targets = list(quantized) if settings.quantized else [], list(targets)
    rows = [_share(x.rows, settings.shard_size) for x in quantized]
    packed_names = {x.parameter for x in quantized}
    kept = sum(
        _share(shape[0] if shape else 1, settings.shard_size) * prod(shape[1:])
        for name, shape in shapes.parameters.items()
        if name not in packed_names
    )
    adapters = FLOAT32 * sum(
        _share(shape[0], settings.shard_size) * shape[1] for x in targets for shape in lora_shapes(x, settings.r)
    )
    activations, host_activations = _activations(shapes, settings)
    return BytesPerRank(
        base_packed=sum(rows) * ROW_BYTES,
        base_statistics=sum(statistics_bytes(n, settings.double_quant) for n in rows),
        base_kept=kept * settings.itemsize,
        adapters=adapters,
        gradients=adapters,
        optimizer=adapters * settings.optimizer_states,
        activations=activations,
        logits=_logits(shapes, settings),
        gather=_gather(shapes, quantized, targets, settings),
        host_parameters=settings.offload_parameters,
        host_activations=host_activations,
    )


def _layer_activations(shapes: ModelShapes, layer: str, settings: StorageSettings) -> int:
    """Return what one decoder layer keeps for backward: each linear's input and output, norms, attention weights."""
    tokens = settings.micro_batch_size * settings.max_length
    inside = [x for x in shapes.linears if x.name.startswith(layer + ".")]
    per_token = sum(x.in_features + x.out_features + settings.r for x in inside) + 6 * shapes.hidden_size
    # eager attention keeps scores and weights; the others recompute them
    attention = 2 * shapes.num_attention_heads * settings.max_length if settings.eager_attention else 0
    return tokens * (per_token + attention) * settings.itemsize


def _activations(shapes: ModelShapes, settings: StorageSettings) -> tuple[int, int]:
    """Return the bytes of activations on the device and in host memory."""
    layers = [_layer_activations(shapes, layer, settings) for layer in shapes.layers]
    edge = settings.micro_batch_size * settings.max_length * shapes.hidden_size * settings.itemsize
    recomputed = max(layers) if settings.checkpointing else 0
    kept = [edge] * len(layers) if settings.checkpointing else layers
    on_device = sum(sorted(kept)[-_LAYERS_ON_DEVICE:]) if settings.offload_activations else sum(kept)
    return edge + on_device + recomputed, sum(kept) if settings.offload_activations else 0


def _logits(shapes: ModelShapes, settings: StorageSettings) -> int:
    chunk = min(settings.logits_chunk, settings.micro_batch_size * settings.max_length)
    return chunk * shapes.vocab_size * (settings.itemsize + 3 * FLOAT32)  # raw, float32, slope and its temporary


def _gather(
    shapes: ModelShapes, quantized: list[LinearShape], targets: list[LinearShape], settings: StorageSettings
) -> int:
    """Return the largest gathered units (one computes while the next arrive) and one dequantized weight."""
    packed = {x.parameter: x for x in quantized}
    adapted = {x.name: x for x in targets}

    def whole(prefix: str) -> int:
        total = 0
        for name, shape in shapes.parameters.items():
            if not name.startswith(prefix + "."):
                continue
            if name in packed:
                rows = packed[name].rows
                total += rows * ROW_BYTES + statistics_bytes(rows, settings.double_quant)
            else:
                total += prod(shape) * settings.itemsize
        lora = sum(
            prod(s) for n, x in adapted.items() if n.startswith(prefix + ".") for s in lora_shapes(x, settings.r)
        )
        return total + lora * settings.itemsize

    units = sorted((whole(name) for name in {*shapes.layers, shapes.embedding, shapes.head}), reverse=True)
    dense = max((x.numel // x.count for x in quantized), default=0) * settings.itemsize
    gathers = settings.shard_size > 1 or settings.offload_parameters
    return sum(units[: 1 + settings.prefetch]) + dense if gathers else dense
