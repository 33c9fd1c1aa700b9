"""Estimates the time of a step on a named device, by arithmetic over operations and bytes moved.

Operations per token, counting multiplications and additions separately as in Kaplan et al., 2020
(https://arxiv.org/abs/2001.08361, section 2.1), without those that a frozen base does not need:

    forward    2 N + 2 V H + 2 A + S        N: weights of the linears a token goes through, V H: the head,
    backward   2 N + 2 V H + 4 A + 2.5 S    A: adapter weights, S = 2 x width x length per layer: causal attention
    recompute  2 N         + 2 A + S        (full checkpointing; the head is not recomputed)

Frozen weights get no gradient, so backward is 2 N, not 4 N. Flash attention's backward takes 2.5 S (Dao, 2023,
https://arxiv.org/abs/2307.08691, section 3.1) because it recomputes the scores. A vision tower adds its own
(`TowerMemory.operations`), for as many images as rows may have.

A micro-batch takes

    max(compute + dequantize, gather + copies over the same bus) + gather of the largest unit

because the next unit arrives while one computes; the last term is the one gather that nothing overlaps. A rank that
shards with no other copies its layers from host memory ahead (`parallel/copy_ahead.py`), but neither the embedding and
the head nor the first layer of a pass, forward or backward; these copies are added. (Of ``fsdp.offload_modules``, the
head is copied ahead.) Without prefetching
(``fsdp.prefetch=0``) nothing overlaps, and it takes the sum of computing and moving. A step takes that for each
micro-batch of a rank, plus one reduction of the adapters' gradients. Of N ranks, each sends (N - 1) / N of their
bytes, and twice that if all ranks keep all gradients (``fsdp.adapters=replicated``), because the sums are sent back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from fsdp_qlora.data.deal import BatchPlan
from fsdp_qlora.plan.devices import LINK_SHARE, MFU, Device, Interconnect
from fsdp_qlora.plan.memory import FLOAT32
from fsdp_qlora.plan.moved import copied_alone, copied_modules, gathered_bytes, received_bytes
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes, quantized_linears


@dataclass(frozen=True)
class Flops:
    """Operations per token."""

    forward: float
    backward: float
    recompute: float

    @property
    def total(self) -> float:
        """Sum of all of them."""
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True)
class StepTime:
    """The estimated time of a step and its components."""

    gathered_bytes: int
    """Bytes that a rank receives for one micro-batch."""
    gather_seconds: float
    compute_seconds: float
    dequantize_seconds: float
    """Dequantizing every weight, each time it is used."""
    copy_seconds: float
    """Copies to and from host memory (offload)."""
    micro_batch_seconds: float
    reduce_seconds: float
    """Reducing the adapters' gradients across ranks, once per step."""
    step_seconds: float
    tokens_per_second: float
    """Across all ranks."""
    balanced_tokens: int
    """Tokens in a micro-batch from which computing takes longer than gathering."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def flops_per_token(plan: TrainPlan, shapes: ModelShapes, settings: StorageSettings | None = None) -> Flops:
    """Return the operations per token at the settings' maximum length."""
    settings = settings or plan.settings
    weights = sum(x.numel_each * times for x, times in linears_of_token(plan, shapes))
    head, adapters = shapes.vocab_size * shapes.hidden_size, _adapters_of_token(plan, shapes)
    attention = _attention(plan, settings.max_length)
    return Flops(
        forward=2 * (weights + head + adapters) + attention,
        backward=2 * (weights + head) + 4 * adapters + 2.5 * attention,
        recompute=2 * (weights + adapters) + attention if settings.checkpointing == "full" else 0,
    )


def linears_of_token(plan: TrainPlan, shapes: ModelShapes) -> list[tuple[LinearShape, int]]:
    """Return the linears of the decoder layers that a token goes through, and how many matrices of each."""
    inner = quantized_linears(shapes) or shapes.linears
    return [(x, min(shapes.experts_per_token, x.count) if x.count > 1 else 1) for x in inner]


def _adapters_of_token(plan: TrainPlan, shapes: ModelShapes) -> int:
    """Return the number of adapter elements that a token is multiplied with: of experts, those it goes through."""
    idle = {x.name: 1 - min(shapes.experts_per_token, x.count) / x.count for x in plan.parameters}
    unused = (sum(map(prod, plan.memory.trained[name].values())) * share for name, share in idle.items())
    return plan.trainable_parameters - round(sum(unused))


def _attention(plan: TrainPlan, length: float) -> float:
    """Return S, the attention operations per token at that sequence length."""
    return sum(2 * layer.attention_width * length for layer in plan.memory.activations)


def model_flops(plan: TrainPlan, shapes: ModelShapes, tokens: float, targets: float, rows: float) -> float:
    """Return the operations that real tokens need, without recomputation or padding.

    The head counts only for ``targets``, the supervised tokens. Attention counts at the mean length of the ``rows``,
    and its backward as 2 S: the other half S recomputes scores.
    """
    token = flops_per_token(plan, shapes)
    attention = _attention(plan, plan.settings.max_length)
    head = 4 * shapes.vocab_size * shapes.hidden_size  # forward and backward, 2 V H each
    # replaces attention at maximum length (S + 2.5 S) by attention at the mean length (S + 2 S)
    each = token.forward + token.backward - 3.5 * attention - head + 3 * _attention(plan, tokens / max(1, rows))
    return tokens * each + targets * head


def step_time(
    plan: TrainPlan,
    shapes: ModelShapes,
    device: Device,
    link: Interconnect,
    prefetch: bool,
    settings: StorageSettings | None = None,
    accumulation_steps: int | None = None,
) -> StepTime:
    """Return the estimated time of a step, by the formulas above.

    Args:
        plan: the plan.
        shapes: the model.
        device: the device of each rank.
        link: the interconnect that ranks gather over.
        prefetch: whether units are gathered ahead.
        settings: storage settings, if other than the plan's (for a search).
        accumulation_steps: micro-batches per rank, if other than the plan's.
    """
    settings, memory = settings or plan.settings, plan.memory
    turns = accumulation_steps or plan.batch.accumulation_steps
    batch = plan.batch if accumulation_steps is None else plan.batch.of_rows(settings.micro_batch_size)
    rate = device.teraflops * 1e12 * MFU
    token = (flops_per_token(plan, shapes, settings).total + memory.tower.operations(settings) / settings.tokens) / rate
    compute = token * settings.tokens
    gathered = gathered_bytes(memory, settings)
    gather = gathered / link.rate if settings.shard_size > 1 else 0.0
    dequantize = _dequantized_bytes(plan, shapes, settings) / (device.bandwidth * 1e9)
    copies = _copied_bytes(plan, settings) / (device.host * 1e9 * LINK_SHARE)
    largest = max(unit.gathered for unit in (*memory.layers, *memory.edges))
    alone = copied_alone(memory, settings) / (device.host * 1e9 * LINK_SHARE)
    exposed = largest * (settings.shard_size - 1) / settings.shard_size / link.rate + alone
    moving = gather + copies if link.over_host_bus else max(gather, copies)
    moving -= alone
    working = compute + dequantize
    micro_batch = max(working, moving) + exposed if prefetch else working + moving + alone
    ranks, ways = (settings.adapter_copies, 2) if settings.adapter_copies else (settings.shard_size, 1)
    reduce = ways * FLOAT32 * plan.trainable_parameters * (ranks - 1) / ranks / link.rate
    step = turns * micro_batch + reduce
    return StepTime(
        gathered, gather, compute, dequantize, copies, micro_batch, reduce, step,
        tokens_per_second=_tokens_of_step(batch, settings, turns) / step,
        balanced_tokens=ceil(max(0.0, gather - dequantize) / token),
    )  # fmt: skip


def _tokens_of_step(batch: BatchPlan, settings: StorageSettings, turns: int) -> int:
    """Return the tokens of a step over all ranks: a rank without a micro-batch in a turn adds none."""
    return settings.tokens * min(batch.num_micro_batches, turns * batch.num_ranks)


def _dequantized_bytes(plan: TrainPlan, shapes: ModelShapes, settings: StorageSettings) -> float:
    """Return the bytes read and written by dequantization: a code and an element per weight, each time it is used."""
    inside = {x.name for x in shapes.linears}  # excludes embeddings, which dequantize single rows
    # forward and backward, plus the recomputed forward; a dense weight that is kept is dequantized once, or never again
    kept = 0 if settings.keeps_dense else 1
    times = kept if settings.cache_dequantized else 3 if settings.checkpointing == "full" else 2
    total = 0.0
    for x in plan.quantized:
        if x.linear.name in inside:
            uses = times if x.quant_format.dense_forward else 1  # otherwise dense in backward only
            total += x.linear.numel * (x.code_bytes + settings.itemsize) * uses
    return total


def _copied_bytes(plan: TrainPlan, settings: StorageSettings) -> int:
    """Return the bytes copied between device and host memory for one micro-batch."""
    copied = 0
    if settings.offload_activations:
        copied += 2 * plan.memory.plan(settings).host.offloaded_activations
    if settings.offload_parameters:  # each rank copies in its own shard for each gather
        copied += received_bytes(plan.memory, settings) // settings.shard_size
    else:
        copied += copied_modules(plan.memory)
    return copied
