"""Decisions made before any memory is allocated: attention, plan, memory budget, and whether to compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fsdp_qlora.adapters import build_method
from fsdp_qlora.attention.candidates import EAGER, attention_candidates
from fsdp_qlora.config.auto import Choice, asked, degree
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import DataSettings, RunConfig
from fsdp_qlora.data.pack import best_fit_decreasing
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.distributed.memory import memory_of
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.process import ACCELERATORS, Placement, device_model, device_types
from fsdp_qlora.distributed.reduce import all_max, on_main
from fsdp_qlora.errors import PlanError
from fsdp_qlora.load.stored import require_readable
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.folder import config_for_plan
from fsdp_qlora.model.fused import fusible
from fsdp_qlora.model.heads import head_modules
from fsdp_qlora.model.kernels import KERNELS
from fsdp_qlora.model.rope import settle_rope
from fsdp_qlora.model.runs import with_runs
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.parallel.compile import COMPILED_TYPES, can_compile
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.choices import decided, tensor_budget
from fsdp_qlora.plan.compilation import Compilation, Work, choose_compilation
from fsdp_qlora.plan.devices import device_of_driver, find_device, find_interconnect
from fsdp_qlora.plan.layout import Cluster, settle_shard_degree
from fsdp_qlora.plan.plan import TrainPlan, make_plan
from fsdp_qlora.plan.recipe import Recipe, RowCounts, Shape, choose_recipe
from fsdp_qlora.plan.sizes import parse_bytes
from fsdp_qlora.run.images import images_choice, images_stated, settle_images
from fsdp_qlora.run.labels import planned_labels
from fsdp_qlora.run.world import World
from fsdp_qlora.shapes.linears import ModelShapes

SHARD_DEGREE = "fsdp.shard_degree"


def plan_for(config: RunConfig, world_size: int) -> TrainPlan:
    """Plan a run from the model's config alone: no weights, no process group, no network."""
    return planned(config, world_size)[2]


def planned(config: RunConfig, world_size: int) -> tuple[RunConfig, PreTrainedModel, TrainPlan]:
    """Return the settings with every ``auto`` resolved, the meta model and the plan, from the model's config alone."""
    config, base = planned_skeleton(config)
    if build_objective(config.objective).trains_head:
        config = with_head(config, head_modules(base))
    shapes = images_stated(config, shapes_to_plan(config, base), base.config)
    budget = planned_budget(config, world_size)
    recipe = choose_recipe(config, shape_of(base, shapes), None)
    config = recipe.settled(config)
    config, choice = settle_shard_degree(config, shapes, _planned_cluster(config, world_size, budget))
    plan = make_plan(config, shapes, world_size, budget)
    if choice is not None:
        plan = replace(plan, choices={SHARD_DEGREE: choice, **plan.choices})
    images = images_choice(config, base.config.model_type, shapes)
    plan = replace(plan, choices={**images, **recipe.choices, **plan.choices})
    resolved = decided(config, plan.settings)
    elsewhere = config.plan.gpu or config.plan.device
    require_kernels(resolved, base, None if elsewhere else torch.device(config.launcher.device))
    return resolved, base, plan


def shapes_to_plan(config: RunConfig, base: PreTrainedModel, folder: Path | None = None) -> ModelShapes:
    """Return the shapes of a meta model, with what the rows of the objective take in its layers.

    ``folder`` is the model's; None finds it by its name.
    """
    if folder is None:
        folder = config_for_plan(config.model.name, config.model.revision)
    objective, accelerated = build_objective(config.objective), (asked(config.launcher.device) or "cpu") != "cpu"
    return with_runs(read_shapes(base), base, objective, folder, config.data.max_length, accelerated)


def shape_of(base: PreTrainedModel, shapes: ModelShapes) -> Shape:
    """Return what the learning rate depends on."""
    return Shape(shapes.hidden_size, base.config.get_text_config().model_type)


def rows_of(data: DataSettings, prepared: PreparedData | None) -> RowCounts | None:
    """Return how many sequences there are; None if they were not counted (none, or a stream)."""
    if prepared is None or prepared.train is None:
        return None
    train = len(prepared.train)
    if data.packing:
        train = len(best_fit_decreasing(prepared.encoder.rows(prepared.train).lengths, data.max_length))
    return RowCounts(train, 0 if prepared.eval is None else len(prepared.eval))


def require_kernels(config: RunConfig, base: PreTrainedModel, device: torch.device | None) -> None:
    """Refuse ``train.kernels`` where it cannot run; None is a device of some other machine.

    Raises:
        PlanError: if something is missing here, or if it could compute nothing of this model.
    """
    kernels = KERNELS[config.train.kernels]()
    refusal = None if device is None else kernels.refusal(device)
    fused = fusible(base, kernels, model_dtype(config.precision.name))
    if refusal is None and kernels.needs_modules and not fused.modules:
        refusal = f"{kernels.name} has no kernel for any module of this model ({fused.describe()}); set it to torch."
    if refusal is not None:
        raise PlanError(f"train.kernels: {refusal}")


def _planned_cluster(config: RunConfig, world_size: int, budget: int) -> Cluster:
    node_size = min(config.launcher.nproc_per_node or world_size, world_size)
    if config.plan.device is None:
        return Cluster(world_size, node_size, budget)
    device = find_device(config.plan.device)
    link = find_interconnect(config.plan.interconnect or device.interconnect)
    return Cluster(world_size, node_size, budget, device, link)


def settled_world(config: RunConfig, folder: Path, world: World, budget: int) -> tuple[RunConfig, World, Choice | None]:
    """Return the settings with ``fsdp.shard_degree`` settled, the ranks laid out by it, and the choice.

    Every rank calls it.
    """
    if degree(config.fsdp.shard_degree) is not None:
        return config, world, None
    ranks, node_size = world.ranks, world.placement.local_world_size

    def choose() -> list[str]:
        asked_for = with_attention(config, ranks.device, folder)
        device = device_of_driver(device_model(ranks.device)) if ranks.device.type != "cpu" else None
        link = None if device is None else find_interconnect(device.interconnect)
        cluster = Cluster(ranks.size, node_size, budget, device, link)
        _, choice = settle_shard_degree(
            asked_for, shapes_to_plan(asked_for, skeleton(asked_for, folder), folder), cluster
        )
        assert choice is not None
        return [choice.value, choice.why]

    value, why = on_main(choose, ranks)
    size = int(value)
    fsdp = replace(config.fsdp, shard_degree=size, replicate_degree=ranks.size // size)
    return replace(config, fsdp=fsdp), world.resharded(size), Choice(value, why)


def planned_budget(config: RunConfig, world_size: int) -> int:
    """Return the bytes that tensors may take on the planned device, or on this machine's if none is named."""
    if config.plan.gpu or config.plan.device:
        capacity = config.plan.gpu or find_device(config.plan.device or "").memory
        return tensor_budget(parse_bytes(capacity), True)
    kind = next(iter(device_types()))
    return tensor_budget(memory_of(torch.device(kind), world_size), kind != "cpu")


def planned_skeleton(config: RunConfig) -> tuple[RunConfig, PreTrainedModel]:
    """Return the settings resolved for the planned device (a GPU if one is named), and the meta model.

    Raises:
        ModelError: if the model is not a folder, not in the hub cache, and not one of the shapes known by name.
    """
    source = config_for_plan(check(config).model.name, config.model.revision)
    config = settle_images(planned_labels(config, source), source)
    device = planned_device(config)
    config = with_attention(on_device(config, device), torch.device(device), source)
    base = skeleton(config, source)
    return with_rows(config, source, base), base


def planned_device(config: RunConfig) -> str:
    """Return the type of device that a run is planned for: a GPU if one is named, else this machine's."""
    return ACCELERATORS[0] if config.plan.gpu or config.plan.device else next(iter(device_types()))


def on_device(config: RunConfig, kind: str) -> RunConfig:
    """Return the settings with the device type settled."""
    return replace(config, launcher=replace(config.launcher, device=kind))


def with_attention(config: RunConfig, device: torch.device, source: Path) -> RunConfig:
    """Return the settings with ``auto`` attention replaced by the first candidate for this device and model."""
    return replace_attention(config, attentions_for(config, device, source)[0])


def attentions_for(config: RunConfig, device: torch.device, source: Path) -> tuple[str, ...]:
    """Return the attention implementations to try, preferred first."""
    model, wanted = config.model, asked(config.model.attn_implementation)
    if config.debug.name == "plain":
        wanted = wanted or EAGER
    model_config = load_config(source, model.trust_remote_code, model.config_overrides)
    dtype = model_dtype(config.precision.name)
    auto_class = build_objective(config.objective).auto_class
    return attention_candidates(device, wanted, model_config, dtype, model.trust_remote_code, auto_class)


def replace_attention(config: RunConfig, attention: str) -> RunConfig:
    """Return the settings with this attention implementation."""
    return replace(config, model=replace(config.model, attn_implementation=attention))


def skeleton(config: RunConfig, folder: Path) -> PreTrainedModel:
    """Build the meta model of ``folder`` with the chosen attention, and rotary embeddings for ``data.max_length``."""
    model = config.model
    require_readable(folder, config.quant)
    base = build_skeleton(
        folder, model_dtype(config.precision.name), model.attn_implementation, model.trust_remote_code,
        model.config_overrides, build_objective(config.objective),
    )  # fmt: skip
    settle_rope(base, config.data.max_length)
    return base


def with_rows(config: RunConfig, folder: Path, base: PreTrainedModel) -> RunConfig:
    """Return the settings with what the model decides of its rows: what its encoder reads, and how long each is."""
    settled = build_objective(config.objective).settled(folder, base.config)
    length = build_objective(settled).row_length(folder, base.config) or config.data.max_length
    return replace(config, objective=settled, data=replace(config.data, max_length=length))


def with_head(config: RunConfig, modules: Sequence[str]) -> RunConfig:
    """Return the settings with a head's modules trained whole; with ``lora=none`` they are trained anyway."""
    if config.lora.trains_base:
        return config
    whole = dict.fromkeys((*config.lora.modules_to_save, *modules))
    return replace(config, lora=replace(config.lora, modules_to_save=list(whole)))


def rank_budget(ranks: Ranks, placement: Placement) -> int:
    """Return the bytes that a rank's tensors may take: the minimum over the ranks, so that all make the same plan."""
    device = ranks.device
    capacity = memory_of(device, placement.local_world_size)
    return tensor_budget(int(-all_max(-float(capacity), ranks)), device.type != "cpu")


def compilation_for(
    config: RunConfig, base: PreTrainedModel, plan: TrainPlan, data: PreparedData | None, device: torch.device,
    training: bool, recipe: Recipe,
) -> Compilation:  # fmt: skip
    """Decide ``train.compile``."""
    if not training:
        return Compilation(False, "no training")
    settings = plan.settings
    rows = len(data.train) if data is not None and data.train is not None else 0
    steps = recipe.num_steps(config, rows)
    weights = sum(x.linear.numel_each for x in plan.quantized)
    length = settings.max_length
    if data is not None and data.train is not None and not config.data.packing:
        length = min(length, data.train_counts.tokens // max(1, rows))
    work = Work(plan.batch.accumulation_steps, plan.batch.micro_batch_size * length, weights)
    ours = build_method(config.lora.method).layer is not None  # PEFT's layers are not known to be one graph
    known = ours and base.config.model_type in COMPILED_TYPES and plan.quantized != ()
    return choose_compilation(config, work, steps, device.type, known and can_compile(device))
