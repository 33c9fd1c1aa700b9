"""`make_plan`: settings and shapes -> everything that is decided before a byte is allocated."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, PlanError
from fsdp_qlora.plan.batch import BatchPlan
from fsdp_qlora.plan.layout import LinearShape, ModelShapes, fsdp_units, quantized_linears, target_linears
from fsdp_qlora.plan.memory import BytesPerRank, StorageSettings, bytes_per_rank

_OPTIMIZER_STATES = {"adamw": 2, "sgd": 1}
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do on each rank."""

    world_size: int
    shard_size: int
    quantized: tuple[LinearShape, ...]
    """Linears stored in 4-bit; empty with ``quant=none``."""
    targets: tuple[str, ...]
    """Linears that get an adapter."""
    units: tuple[tuple[str, ...], ...]
    """FSDP units, as tuples of module names."""
    batch: BatchPlan
    bytes: BytesPerRank
    trainable_parameters: int
    base_parameters: int

    def to_dict(self, gpu: str | None = None, simulated_bytes: int | None = None) -> dict[str, Any]:
        """Return the plan as the JSON of `fsdp-qlora plan plan.json=true`; a simulated peak decides what fits."""
        peak = self.bytes.total if simulated_bytes is None else simulated_bytes
        reserve = reserve_bytes(peak, gpu)
        capacity = parse_bytes(gpu) if gpu else None
        return {
            "fits": None if capacity is None else peak + reserve <= capacity,
            "reserve_bytes": reserve,
            "bytes_per_rank": asdict(self.bytes),
            "peak_planned_bytes": self.bytes.total,
            "peak_simulated_bytes": simulated_bytes,
            "world_size": self.world_size,
            "trainable_parameters": self.trainable_parameters,
            "base_parameters": self.base_parameters,
            "quantized_linears": len(self.quantized),
            "fsdp_units": len(self.units) + 1,
            "micro_batches_per_rank": self.batch.accumulation_steps,
        }


def make_plan(config: RunConfig, shapes: ModelShapes, world_size: int) -> TrainPlan:
    """Decide what is quantized, trained and sharded, and what it weighs.

    ``model.attn_implementation=auto`` counts as one that keeps no attention scores.

    Raises:
        PlanError: if a target module matches nothing, or the ranks cannot be laid out as asked.
    """
    targets = target_linears(shapes, config.lora.target_modules)
    by_name = {x.name: x for x in shapes.linears}
    quantized = quantized_linears(shapes) if config.quant.name != "none" else ()
    replicate = config.fsdp.replicate_degree
    shard = config.fsdp.shard_degree or world_size // replicate
    if shard * replicate != world_size:
        raise PlanError(f"fsdp.shard_degree: {shard} x replicate_degree {replicate} is not {world_size} ranks.")
    rows = config.train.micro_batch_size
    if config.train.micro_batch_tokens:  # the worst case: all rows as long as they may be
        rows = max(1, config.train.micro_batch_tokens // config.data.max_length)
    settings = StorageSettings(
        shard_size=shard,
        quantized=bool(quantized),
        double_quant=config.quant.double_quant,
        itemsize=2 if config.precision.name == "bf16" else 4,
        r=config.lora.r,
        optimizer_states=_OPTIMIZER_STATES[config.optim.name],
        micro_batch_size=rows,
        max_length=config.data.max_length,
        checkpointing=config.train.activation_checkpointing == "full",
        eager_attention=config.model.attn_implementation == "eager",
        logits_chunk=config.train.logits_chunk,
    )
    target_shapes = [by_name[name] for name in targets]
    return TrainPlan(
        world_size=world_size,
        shard_size=shard,
        quantized=quantized,
        targets=targets,
        units=fsdp_units(shapes),
        batch=BatchPlan(config.train.global_batch_size, rows, world_size),
        bytes=bytes_per_rank(shapes, quantized, target_shapes, settings),
        trainable_parameters=sum(config.lora.r * (x.in_features + x.out_features) for x in target_shapes),
        base_parameters=sum(_numel(shape) for shape in shapes.parameters.values()),
    )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def parse_bytes(text: str) -> int:
    """Return the bytes of ``24GiB``, ``80GB`` or a plain number.

    Raises:
        ConfigError: if it is none of these.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match:
        raise ConfigError(f"plan.gpu: {text!r} is no amount of memory; write it as 24GiB or 80GB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def reserve_bytes(peak: int, gpu: str | None) -> int:
    """Return what is kept free for the framework: the larger of 1.5 GiB and 6 % of the device (or of the peak)."""
    return max(int(1.5 * 2**30), int(0.06 * (parse_bytes(gpu) if gpu else peak)))
