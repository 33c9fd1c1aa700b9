"""Bytes that a rank moves for one micro-batch: from other ranks, and from its own host memory; arithmetic only."""

from __future__ import annotations

from fsdp_qlora.plan.memory import MemoryModel
from fsdp_qlora.plan.storage import StorageSettings


def gathered_bytes(memory: MemoryModel, settings: StorageSettings) -> int:
    """Return the bytes that a rank receives from others for one micro-batch, forward and backward."""
    return received_bytes(memory, settings) * (settings.shard_size - 1) // settings.shard_size


def received_bytes(memory: MemoryModel, settings: StorageSettings) -> int:
    """Return the bytes of all units gathered for one micro-batch, forward and backward, this rank's own included.

    Units that stay gathered are received once per step, and count here with a micro-batch's share of that.
    """
    layers, edges = sum(unit.gathered for unit in memory.layers), _edges(memory)
    turns = settings.accumulation_steps
    received = layers // turns if not settings.reshard_after_forward else 2 * layers
    return received + (edges // turns if settings.edges_stay else edges)


def copied_alone(memory: MemoryModel, settings: StorageSettings) -> int:
    """Return the bytes that a rank copies from host memory for one micro-batch while it cannot compute.

    With several ranks, FSDP copies all units ahead; alone, a rank copies its layers ahead, but neither the embedding
    and the head nor the layer that begins a pass (`parallel/copy_ahead.py`). Of `fsdp.offload_modules`, it copies the
    head ahead, too.
    """
    if settings.shard_size > 1:
        return 0
    if not settings.offload_parameters:
        shapes, sizes = memory.shapes, memory.host_shards
        waited = (shapes.embedding, *shapes.layers[:1], *shapes.layers[-1:])
        return sum(size for owner in waited for name, size in sizes.items() if name.startswith(f"{owner}."))
    begin = (*memory.layers[:1], *(memory.layers[-1:] if settings.reshard_after_forward else ()))
    return _edges(memory) + sum(unit.gathered for unit in begin)


def copied_modules(memory: MemoryModel) -> int:
    """Return the bytes of `fsdp.offload_modules` that a rank copies from host memory for one micro-batch.

    Backward needs neither the embedding nor the head.
    """
    edges = (f"{memory.shapes.embedding}.", f"{memory.shapes.head}.")
    return sum(size if name.startswith(edges) else 2 * size for name, size in memory.host_shards.items())


def _edges(memory: MemoryModel) -> int:
    # Backward needs neither the embedding nor the head, which computes its gradients in forward.
    return sum(unit.gathered for unit in memory.edges[: 1 if memory.shapes.tied else 2])
