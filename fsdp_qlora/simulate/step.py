"""One sharded training step as `train` runs it, on simulated ranks and fake tensors.

Skeleton, swap, adapters, sharding, forward, backward and update use the same functions as a real run. Models of more
than a few layers are simulated at a few small depths and extrapolated, once that has predicted another depth correctly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.norms import follow_adapters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.config.auto import degree
from fsdp_qlora.config.choices import NONE
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.labels import ROWS, TOKENS
from fsdp_qlora.data.loader import Batch, MicroBatch, NamedBatch, TokenBatch
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.errors import PlanError
from fsdp_qlora.load.stream import allocate
from fsdp_qlora.model.folder import config_for_plan
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.objectives import Objective, build_objective
from fsdp_qlora.optim.bnb import PAGED
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.shard import host_modules, model_dtype, synchronizer
from fsdp_qlora.plan.plan import TrainPlan, make_plan
from fsdp_qlora.plan.quantized import format_of
from fsdp_qlora.quant.formats import QuantizedTensor, dequantize, quantize
from fsdp_qlora.quant.swap import keep_dense
from fsdp_qlora.run.build import build_sharded
from fsdp_qlora.run.decide import planned, planned_device, planned_skeleton, shapes_to_plan
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.units import fsdp_units
from fsdp_qlora.simulate.apart import simulate_apart
from fsdp_qlora.simulate.depth import (
    Counts,
    Cut,
    counts_of,
    cut_counts,
    cut_layers,
    extrapolate,
    kept_layers,
    layer_kinds,
    relative_error,
)
from fsdp_qlora.simulate.device import accelerator, accelerator_mode
from fsdp_qlora.simulate.result import Places, Simulation, highest
from fsdp_qlora.simulate.stand_ins import evenly_spread_experts, only_causal_masks
from fsdp_qlora.simulate.tracker import (
    NOT_COUNTED,
    FakeTensorMode,
    Place,
    TensorBytes,
    fake_mode,
    measure_step,
    simulated_ranks,
)
from fsdp_qlora.train.step import StepSettings, forward_backward

WHOLE_LAYERS = 8
"""Models of up to this many layers are simulated in full."""
TOLERANCE = 0.01
"""Largest relative error of the peak, estimated by the checking depth; beyond it the whole model is simulated."""


def simulate(config: RunConfig, world_size: int) -> Simulation:
    """Simulate a step of the run on ``world_size`` ranks, with all tokens supervised.

    A run that is planned for an accelerator (``plan.gpu``, ``plan.device``, or one in this machine) is simulated in a
    process of its own, since registering the simulated device (`fsdp_qlora.simulate.device`) cannot be undone.

    Raises:
        PlanError: if this process is a rank of an open process group, the model cannot be cut, or the settings cannot
            be simulated (`refuse`).
    """
    refuse(config)
    return (
        simulate_here(config, world_size) if planned_device(config) == HOST.type else simulate_apart(config, world_size)
    )


def simulate_here(config: RunConfig, world_size: int) -> Simulation:
    """Simulate as `simulate` does, but always in this process, which must not train on a device afterwards."""
    started = time.perf_counter()
    refuse(config)
    device = HOST if planned_device(config) == HOST.type else accelerator()
    _make_tables(config, device)
    fsdp = config.fsdp
    if degree(fsdp.shard_degree) is None:
        chosen = planned(config, world_size)[0].fsdp
        fsdp = replace(fsdp, shard_degree=chosen.shard_degree, replicate_degree=chosen.replicate_degree)
        config = replace(config, fsdp=fsdp)
    with simulated_ranks(world_size, degree(fsdp.shard_degree) or 0, fsdp.replicate_degree, device) as ranks:
        resolved, base, _ = planned(config, world_size)
        resolved = replace(
            resolved,
            # the tracker needs to see single operations
            train=replace(resolved.train, compile="false", kernels="torch"),
            quant=replace(resolved.quant, llm_int8_threshold=0.0),  # the columns it selects depend on values
        )
        full = counts_of(layer_kinds(base, read_shapes(base)))
        if sum(full) <= WHOLE_LAYERS:
            return _whole(_simulate_cut(resolved, base, ranks), device == HOST, started)
        needed, check = cut_counts(full)
        cuts = [_shallow(resolved, counts, ranks) for counts in (*needed, check)]
        places, error = _extrapolated([cut.device for cut in cuts], full, needed[0])
        host = None
        if device != HOST:
            host, wrong = _extrapolated([cut.host for cut in cuts], full, needed[0])
            error = max(error, wrong)
        if error > TOLERANCE:
            return _whole(_simulate_cut(resolved, base, ranks), device == HOST, started)
    depths = tuple(sum(cut.device.counts) for cut in cuts)
    return Simulation(places, host, depths, error, time.perf_counter() - started)


def refuse(config: RunConfig) -> None:
    """Refuse settings that cannot be simulated on the planned device.

    Raises:
        PlanError: naming them.
    """
    fsdp, name = config.fsdp, config.optim.name
    if planned_device(config) == HOST.type and (fsdp.offloads_parameters or fsdp.offload_modules):
        which = f"offload={fsdp.offload}" if fsdp.offloads_parameters else "offload_modules"
        raise PlanError(
            f"plan.simulate: on a CPU, device and host share one memory, so fsdp.{which} changes nothing that could be "
            "counted; set plan.gpu=24GiB (or plan.device) to simulate a GPU."
        )
    if planned_device(config) != HOST.type and not fsdp.offloads_parameters and name in PAGED:
        plain = "adamw_8bit" if name.endswith("_8bit") else "adamw"
        raise PlanError(
            f"plan.simulate: optim={name} keeps its state in memory that moves between device and host as needed, "
            f"which counts as neither; simulate optim={plain}, which keeps the same bytes on the device."
        )


@dataclass(frozen=True)
class _Cuts:
    """Peaks of one simulated cut, on the device and in host memory."""

    device: Cut
    host: Cut


def _extrapolated(cuts: Sequence[Cut], full: Counts, least: Counts) -> tuple[Places, float]:
    """Return the peaks at full depth from all cuts but the last, and their relative error by the last one."""
    *needed, check = cuts
    places = extrapolate(needed, full)
    if not places:  # nothing is in host memory
        return places, 0.0
    predicted = highest(extrapolate(needed, check.counts))[1].total
    return places, relative_error(predicted, check.total, least, check.counts, full, highest(places)[1].total)


def _whole(cut: _Cuts, on_cpu: bool, started: float) -> Simulation:
    return Simulation(
        cut.device.peaks,
        None if on_cpu else cut.host.peaks,
        (sum(cut.device.counts),),
        None,
        time.perf_counter() - started,
    )


def _make_tables(config: RunConfig, device: torch.device) -> None:
    """Dequantize a block first, outside the fake mode: the tables that this caches are computed from real values."""
    quant = config.quant
    for name in {quant.name, quant.embeddings, *quant.overrides.values()} - {NONE}:
        quant_format = format_of(quant, name)
        block = quantize(torch.zeros(1, 64), quant_format)
        nested, offset = (None if part is None else part.to(device) for part in (block.nested, block.offset))
        there = QuantizedTensor(block.packed.to(device), block.absmax.to(device), nested, offset)
        dequantize(there, quant_format, (1, 64), torch.float32)


def _shallow(config: RunConfig, counts: Counts, ranks: Ranks) -> _Cuts:
    resolved, base = planned_skeleton(config)
    shapes = read_shapes(base)
    cut_layers(base, shapes, kept_layers(layer_kinds(base, shapes), counts))
    return _simulate_cut(resolved, base, ranks)


def _simulate_cut(config: RunConfig, base: PreTrainedModel, ranks: Ranks) -> _Cuts:
    """Build the (cut) model on fake tensors and run one step."""
    shapes = shapes_to_plan(config, base)
    kinds = layer_kinds(base, shapes)
    plan = make_plan(config, shapes, ranks.size)
    config = replace(config, lora=plan.settings.lora)  # EVA's largest ranks
    on_cpu = ranks.device == HOST
    fake = fake_mode() if on_cpu else accelerator_mode()
    if not build_method(config.lora.method).simulates:
        raise PlanError(f"plan.simulate: lora.variant={config.lora.variant} cannot be simulated; the plan counts it.")
    on_device = partial(_fake_buffers, device=ranks.device, mode=fake)
    host, moved = (NOT_COUNTED, _leave) if on_cpu else (HOST, on_device)
    model = build_sharded(config, base, shapes, plan, ranks, host, moved)
    with fake:
        if on_cpu:
            model.to_empty(device=HOST)
        else:
            shards_on = HOST if config.fsdp.offloads_parameters else ranks.device
            allocate(model, shards_on, ranks.device, host_modules(model.base, plan.offloaded))
        follow_adapters(model)
        if plan.settings.keeps_dense:
            keep_dense(base, model_dtype(config.precision.name))
    optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
    optimizer.prepare_state(step=1)  # as in every step after the first
    restarting = plan.settings.restarting
    batch = worst_batch(plan, config, base, config_for_plan(config.model.name, config.model.revision))
    objective = build_objective(config.objective).without_values()
    if not objective.of_tokens:
        batch = replace(batch, micro_batches=[_fake_tensors(part, fake) for part in batch.micro_batches])
    with evenly_spread_experts(), nullcontext() if restarting else only_causal_masks():
        run = step_runner(objective, config, model, batch, ranks)
        units = [base.get_submodule(name) for unit in fsdp_units(shapes) for name in unit]
        update = partial(optimizer.step, 1e-6, 0.5)
        peaks = measure_step(model, optimizer.inner, run, update, fake, units, ranks.device.type)
    counts = counts_of(kinds)
    return _Cuts(*(Cut(counts, _by_name(places, base, shapes, kinds)) for places in (peaks.device, peaks.host)))


def _leave(base: nn.Module) -> None:
    """Leave buffers on the host, where they are."""


def _fake_buffers(base: nn.Module, device: torch.device, mode: FakeTensorMode) -> None:
    """Replace the buffers by fake ones on ``device``: FSDP would move them there, and a real tensor cannot be moved."""
    with mode:
        for module in base.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, torch.empty_like(buffer, device=device))


def _fake_tensors(micro_batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    """Return a micro-batch without values: where upstream's code sees any, it leaves out masks of full rows."""
    assert isinstance(micro_batch, NamedBatch)
    return replace(micro_batch, tensors={name: mode.from_tensor(x) for name, x in micro_batch.tensors.items()})


def step_runner(
    objective: Objective, config: RunConfig, model: CausalModel, batch: Batch, ranks: Ranks
) -> Callable[[Callable[[], None]], object]:
    """Return a function that runs forward and backward as `train` does; it calls its argument before each micro-batch.

    Create it while no unit is gathered.
    """
    reduce_replicated = ReplicatedGradients(trainable_parameters(model), ranks)
    synchronize = synchronizer(config.lora.trains_masters)

    def run(before_each: Callable[[], None]) -> object:
        settings = StepSettings(
            objective=objective, ranks=ranks, seed=config.run.seed,
            max_grad_norm=config.train.max_grad_norm, synchronize=synchronize,
            around=nullcontext, enter=lambda _: before_each(),
        )  # fmt: skip
        model.train()
        with torch.random.fork_rng(devices=[]):
            totals = forward_backward(model, batch, 1, settings)
            reduce_replicated()
            return totals

    return run


def worst_batch(plan: TrainPlan, config: RunConfig, base: PreTrainedModel, folder: Path, rank: int = 0) -> Batch:
    """Return a rank's batch of rows of maximum length of which all is learned, in at most two micro-batches.

    From the second micro-batch on, unreduced gradients exist as well; further ones change nothing.

    Raises:
        PlanError: if the objective does not say what rows of this model look like.
    """
    rows, count = plan.batch.micro_batch_size, min(2, plan.batch.accumulation_steps)
    max_length = plan.settings.max_length
    objective = build_objective(config.objective)
    micro_batches: list[MicroBatch] = []
    for number in range(rank * count, (rank + 1) * count):
        numbers = tuple(range(rows))
        if objective.of_tokens:
            ids = torch.arange(rows * max_length).remainder(plan.memory.shapes.vocab_size).view(rows, max_length)
            positions = torch.arange(max_length).expand(rows, -1).contiguous() if config.data.packing else None
            micro_batches.append(TokenBatch(number, ids, ids.clone(), rows=numbers, position_ids=positions))
            continue
        tensors = objective.stand_in(folder, base.config, rows, max_length)
        if tensors is None:
            raise PlanError(
                f"plan.simulate: no step of objective={objective.name} with a {base.config.model_type} can be "
                "simulated; set it to false."
            )
        micro_batches.append(NamedBatch(number, tensors, rows=numbers))
    all_rows = count * rows * plan.world_size
    tokens = all_rows * max_length
    return Batch(micro_batches, all_rows, tokens, {TOKENS: tokens - all_rows, ROWS: all_rows})


def _by_name(
    peaks: dict[Place, TensorBytes], base: PreTrainedModel, shapes: ModelShapes, kinds: list[int]
) -> dict[str, TensorBytes]:
    """Name the places identically for models of any depth: the first and last layer of each kind."""
    names: dict[nn.Module | None, str] = {None: "the adapters"}
    for module, name in ((shapes.embedding, "the embedding"), (shapes.head, "the head")):
        if module:
            names[base.get_submodule(module)] = name
    several = len(set(kinds)) > 1
    for i, (module, kind) in enumerate(zip(shapes.layers, kinds, strict=True)):
        mine = [k for k, other in enumerate(kinds) if other == kind]
        which = "first" if i == mine[0] else "last" if i == mine[-1] else "an inner"
        article = "" if which == "an inner" else "the "
        names[base.get_submodule(module)] = f"{article}{which} layer" + (f" of kind {kind + 1}" if several else "")
    found: dict[str, TensorBytes] = {}
    for (phase, module), peak in peaks.items():
        name = f"{phase} of {names.get(module, 'modules outside all units')}"
        if name not in found or peak.total > found[name].total:
            found[name] = peak
    return found
