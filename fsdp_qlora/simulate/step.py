"""One sharded training step as `train` runs it, on simulated ranks and fake tensors.

Skeleton, swap, adapters, sharding, forward, backward and update use the same functions as a real run. Models of more
than a few layers are simulated at a few small depths and extrapolated, once that has predicted another depth correctly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.config.auto import degree
from fsdp_qlora.config.choices import NONE
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.labels import ROWS, TOKENS
from fsdp_qlora.data.loader import Batch, MicroBatch
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.shard import synchronize_gradients
from fsdp_qlora.plan.plan import TrainPlan, make_plan
from fsdp_qlora.plan.quantized import format_of
from fsdp_qlora.quant.formats import dequantize, quantize
from fsdp_qlora.run.build import build_sharded
from fsdp_qlora.run.decide import planned, planned_skeleton
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.units import fsdp_units
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
from fsdp_qlora.simulate.stand_ins import evenly_spread_experts, only_causal_masks
from fsdp_qlora.simulate.tracker import NOT_COUNTED, Place, TensorBytes, fake_mode, measure_step, simulated_ranks
from fsdp_qlora.track.console import megabytes
from fsdp_qlora.train.step import StepSettings, forward_backward

WHOLE_LAYERS = 8
"""Models of up to this many layers are simulated in full."""
TOLERANCE = 0.01
"""Largest relative error of the peak, estimated by the checking depth; beyond it the whole model is simulated."""


@dataclass(frozen=True)
class Simulation:
    """Memory of a simulated step on the fullest rank."""

    peak: TensorBytes
    """Bytes of the tensors at the highest peak."""
    place: str
    """Where in the step the highest peak is."""
    places: dict[str, TensorBytes]
    """The peak at every place."""
    depths: tuple[int, ...]
    """Numbers of layers that were simulated; a single entry if it was the whole model."""
    checked: float | None
    """Relative error of the peak, estimated by the checking depth; None for a whole model."""
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Bytes of tensors at the peak."""
        return self.peak.total

    @property
    def how(self) -> str:
        """How the peak was found, in a few words."""
        if self.checked is None:
            return "the whole model"
        *cuts, last = self.depths
        depths = ", ".join(map(str, cuts))
        return f"extrapolated from {depths} layers, checked with {last}: at most {100 * self.checked:.2f} % off"

    def rows(self, plan: TrainPlan) -> list[tuple[str, str]]:
        """Return the planned and the simulated bytes side by side, as rows of a table."""
        found, planned = self.peak, plan.bytes
        base = planned.base_packed + planned.base_statistics + planned.base_kept + planned.adapters
        pairs = (
            ("base and adapters", base, found.parameters),
            ("gradients", planned.gradients, found.gradients),
            ("optimizer", planned.optimizer, found.optimizer),
            ("activations and logits", planned.activations + planned.logits, found.activations),
            ("gather", planned.gather, found.gather),
            ("peak per rank", plan.peak, found.total),
        )
        rows = [
            (f"simulated {what}", f"{megabytes(there)} (planned {megabytes(known)})") for what, known, there in pairs
        ]
        return [*rows, ("simulated peak is in", self.place), ("simulated", f"{self.how}, {self.seconds:.0f} s")]

    def to_dict(self) -> dict[str, object]:
        """Return what `plan.json=true` prints besides ``peak_simulated_bytes``."""
        return {
            "bytes": asdict(self.peak),
            "place": self.place,
            "layers": list(self.depths),
            "error": self.checked,
            "seconds": round(self.seconds, 1),
        }


def simulate(config: RunConfig, world_size: int) -> Simulation:
    """Simulate a step of the run on ``world_size`` ranks, with all tokens supervised.

    Raises:
        PlanError: if this process is a rank of an open process group, or the model cannot be cut.
    """
    started = time.perf_counter()
    _make_tables(config)
    fsdp = config.fsdp
    if degree(fsdp.shard_degree) is None:
        chosen = planned(config, world_size)[0].fsdp
        fsdp = replace(fsdp, shard_degree=chosen.shard_degree, replicate_degree=chosen.replicate_degree)
        config = replace(config, fsdp=fsdp)
    with simulated_ranks(world_size, degree(fsdp.shard_degree) or 0, fsdp.replicate_degree) as ranks:
        resolved, base, _ = planned(config, world_size)
        resolved = replace(
            resolved,
            # the tracker needs to see single operations
            train=replace(resolved.train, compile="false", kernels="torch"),
            quant=replace(resolved.quant, llm_int8_threshold=0.0),  # the columns it selects depend on values
        )
        full = counts_of(layer_kinds(base, read_shapes(base)))
        if sum(full) <= WHOLE_LAYERS:
            return _whole(_simulate_cut(resolved, base, ranks), started)
        needed, check = cut_counts(full)
        cuts = [_shallow(resolved, counts, ranks) for counts in (*needed, check)]
        place, peak = _highest(places := extrapolate(cuts[:-1], full))
        predicted = _highest(extrapolate(cuts[:-1], check))[1].total
        error = relative_error(predicted, cuts[-1].total, needed[0], check, full, peak.total)
        if error > TOLERANCE:
            return _whole(_simulate_cut(resolved, base, ranks), started)
    depths = tuple(sum(cut.counts) for cut in cuts)
    return Simulation(peak, place, places, depths, error, time.perf_counter() - started)


def _whole(cut: Cut, started: float) -> Simulation:
    place, peak = _highest(cut.peaks)
    return Simulation(peak, place, cut.peaks, (sum(cut.counts),), None, time.perf_counter() - started)


def _highest(places: dict[str, TensorBytes]) -> tuple[str, TensorBytes]:
    return max(places.items(), key=lambda item: item[1].total)


def _make_tables(config: RunConfig) -> None:
    """Dequantize one real block first: the code tables, which are then cached, must not be fake tensors."""
    quant = config.quant
    for name in {quant.name, quant.embeddings, *quant.overrides.values()} - {NONE}:
        quant_format = format_of(quant, name)
        dequantize(quantize(torch.zeros(1, 64), quant_format), quant_format, (1, 64), torch.float32)


def _shallow(config: RunConfig, counts: Counts, ranks: Ranks) -> Cut:
    resolved, base = planned_skeleton(config)
    shapes = read_shapes(base)
    cut_layers(base, shapes, kept_layers(layer_kinds(base, shapes), counts))
    return _simulate_cut(resolved, base, ranks)


def _simulate_cut(config: RunConfig, base: PreTrainedModel, ranks: Ranks) -> Cut:
    """Build the (cut) model on fake tensors and run one step."""
    shapes = read_shapes(base)
    kinds = layer_kinds(base, shapes)
    plan = make_plan(config, shapes, ranks.size)
    model = build_sharded(config, base, shapes, plan, ranks, NOT_COUNTED)
    fake = fake_mode()
    with fake:
        model.to_empty(device=ranks.device)
    optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
    optimizer.prepare_state(step=1)  # as in every step after the first
    batch = worst_batch(plan, config.data.max_length, shapes, config.data.packing or config.data.padding_free)
    restarting = config.data.packing or config.data.padding_free
    with evenly_spread_experts(), nullcontext() if restarting else only_causal_masks():
        peaks = measure_step(
            model, optimizer.inner, step_runner(config, model, batch, ranks), lambda: optimizer.step(1e-6, 0.5), fake,
            [base.get_submodule(name) for unit in fsdp_units(shapes) for name in unit], ranks.device.type,
        )  # fmt: skip
    return Cut(counts_of(kinds), _by_name(peaks, base, shapes, kinds))


def step_runner(
    config: RunConfig, model: CausalModel, batch: Batch, ranks: Ranks
) -> Callable[[Callable[[], None]], object]:
    """Return a function that runs forward and backward as `train` does; it calls its argument before each micro-batch.

    Create it while no unit is gathered.
    """
    reduce_replicated = ReplicatedGradients(trainable_parameters(model), ranks)

    def run(before_each: Callable[[], None]) -> object:
        settings = StepSettings(
            objective=build_objective(config.objective.name), ranks=ranks, seed=config.run.seed,
            max_grad_norm=config.train.max_grad_norm, synchronize=synchronize_gradients,
            around=nullcontext, enter=lambda _: before_each(),
        )  # fmt: skip
        model.train()
        with torch.random.fork_rng(devices=[]):
            totals = forward_backward(model, batch, 1, settings)
            reduce_replicated()
            return totals

    return run


def worst_batch(plan: TrainPlan, max_length: int, shapes: ModelShapes, packed: bool = False) -> Batch:
    """Return a batch of rows of maximum length with all tokens supervised, in at most two micro-batches.

    From the second micro-batch on, unreduced gradients exist as well; further ones change nothing.
    """
    rows, count = plan.batch.micro_batch_size, min(2, plan.batch.accumulation_steps)
    micro_batches = []
    for number in range(count):
        ids = torch.arange(rows * max_length).remainder(shapes.vocab_size).view(rows, max_length)
        positions = torch.arange(max_length).expand(rows, -1).contiguous() if packed else None
        micro_batches.append(MicroBatch(number, ids, ids.clone(), rows=tuple(range(rows)), position_ids=positions))
    all_rows = count * rows * plan.world_size
    tokens = all_rows * max_length
    return Batch(micro_batches, all_rows, tokens, {TOKENS: tokens - all_rows, ROWS: all_rows})


def _by_name(
    peaks: dict[Place, TensorBytes], base: PreTrainedModel, shapes: ModelShapes, kinds: list[int]
) -> dict[str, TensorBytes]:
    """Name the places identically for models of any depth: the first and last layer of each kind."""
    names: dict[nn.Module | None, str] = {None: "the adapters"}
    for module, name in ((shapes.embedding, "the embedding"), (shapes.head, "the head")):
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
