"""`make_plan`: decides everything from settings and shapes, before a byte is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from math import prod
from typing import Any

from fsdp_qlora.adapters import Method, build_method, of_target, parameters_of, spelt_out
from fsdp_qlora.adapters.eva import bounded
from fsdp_qlora.adapters.experts import experts_parameters
from fsdp_qlora.adapters.full import whole_base
from fsdp_qlora.adapters.loraplus import is_faster
from fsdp_qlora.adapters.whole import require_apart, trained_biases, whole_parameters
from fsdp_qlora.config.auto import Choice, asked, degree, switch
from fsdp_qlora.config.choices import NONE, WITH_TABLES
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.data.deal import BatchPlan
from fsdp_qlora.distributed.mesh import degrees
from fsdp_qlora.errors import PlanError
from fsdp_qlora.optim.sizes import unmatched
from fsdp_qlora.plan.choices import choose
from fsdp_qlora.plan.counted import AdapterCost, BytesPerRank, HostBytes
from fsdp_qlora.plan.memory import MemoryModel
from fsdp_qlora.plan.offloaded import offloaded_parameters
from fsdp_qlora.plan.quantized import chosen_edges, chosen_linears
from fsdp_qlora.plan.recipe import batch_for
from fsdp_qlora.plan.sizes import parse_bytes, reserve_bytes
from fsdp_qlora.plan.starts import StartCost, rows_cost, start_cost
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes, edge_shapes
from fsdp_qlora.shapes.modules import parameters_in, whole_modules
from fsdp_qlora.shapes.targets import target_linears, target_parameters
from fsdp_qlora.shapes.tokens import tables_of_tokens, token_rows
from fsdp_qlora.shapes.units import fsdp_units


@dataclass(frozen=True)
class TrainPlan:
    """The plan of a run, for each rank."""

    world_size: int
    shard_size: int
    quantized: tuple[Packed, ...]
    """Quantized weights of the decoder layers and of a vision tower, each with its format; none with ``quant=none``."""
    quantized_edges: tuple[Packed, ...]
    """Quantized embedding and head: one table if they are tied, none if they are not quantized."""
    targets: tuple[str, ...]
    """Linears that get an adapter."""
    parameters: tuple[LinearShape, ...]
    """Stacked expert weights that get adapters, in the model's order."""
    modules: tuple[str, ...]
    """Modules that are trained whole beside the adapters."""
    offloaded: frozenset[str]
    """Unquantized parameters that stay in host memory in float32."""
    units: tuple[tuple[str, ...], ...]
    """FSDP units, as tuples of module names; none if every rank keeps the parameters whole."""
    batch: BatchPlan
    bytes: BytesPerRank
    moments: dict[str, int]
    """Bytes on the device at each of the four moments of a step."""
    host: HostBytes
    trainable_parameters: int
    base_parameters: int
    memory: MemoryModel
    settings: StorageSettings
    choices: dict[str, Choice]
    """The values chosen for ``auto``, by key."""
    start: StartCost | None = None
    """What the adapters' start costs; None if they start from random values, or from directions that EVA settled."""

    @property
    def peak(self) -> int:
        """Planned peak bytes of tensors on the device."""
        return max(self.moments.values())

    def to_dict(self, gpu: str | None = None, simulated_bytes: int | None = None) -> dict[str, Any]:
        """Return the plan as the JSON of `fsdp-qlora plan plan.json=true`; ``fits`` uses a simulated peak if given."""
        peak = self.peak if simulated_bytes is None else simulated_bytes
        reserve = reserve_bytes(peak, gpu)
        capacity = parse_bytes(gpu) if gpu else None
        return {
            "fits": None if capacity is None else peak + reserve <= capacity,
            "reserve_bytes": reserve,
            "bytes_per_rank": asdict(self.bytes),
            "peak_planned_bytes": self.peak,
            "peak_simulated_bytes": simulated_bytes,
            "peak_moment": max(self.moments, key=lambda name: self.moments[name]),
            "bytes_at_moment": dict(self.moments),
            "host_bytes_per_rank": asdict(self.host),
            "world_size": self.world_size,
            "shard_size": self.shard_size,
            "trainable_parameters": self.trainable_parameters,
            "base_parameters": self.base_parameters,
            "quantized_linears": len(self.quantized),
            "fsdp_units": len(self.units) + 1,
            "start": None if self.start is None else asdict(self.start),
            "auto": {key: str(choice) for key, choice in self.choices.items()},
            "micro_batches_per_rank": self.batch.accumulation_steps,
            "batch": {
                "global_rows": self.batch.global_batch_size,
                "micro_batch_rows": self.batch.micro_batch_size,
                "micro_batches": self.batch.num_micro_batches,
                "micro_batches_per_rank": self.batch.accumulation_steps,
                "max_length": self.settings.max_length,
                "tokens_per_step": self.batch.global_batch_size * self.settings.max_length,
            },
        }


def make_plan(config: RunConfig, shapes: ModelShapes, world_size: int, budget: int | None = None) -> TrainPlan:
    """Decide what is quantized, trained and sharded, and add up the memory.

    ``model.attn_implementation=auto`` counts as an implementation that keeps no attention scores.

    Args:
        config: the settings.
        shapes: the model.
        world_size: number of ranks.
        budget: bytes available for a rank's tensors; None if not known, in which case ``auto`` saves memory.

    Raises:
        PlanError: if a target module or a pattern of names matches nothing, or the ranks cannot be laid out as asked.
    """
    asked_for, modules = config.lora, whole_modules(shapes, config.lora.modules_to_save)
    targets, parameters, lora = _targets(config.lora, shapes, modules)
    config = replace(config, lora=lora)
    method = build_method(config.lora.method)
    quantized, edges = _quantized(config, shapes, modules)
    trained, casts = _trained(config, method, shapes, targets, parameters, modules, quantized)
    rows = _token_rows(config, shapes, method, modules)
    _require_matches(config, dict(chain(rows.items(), *(tensors.items() for tensors in trained.values()))))
    batch = BatchPlan(int(batch_for(config.train, None).value), _micro_batch_rows(config), world_size)
    _, shard = degrees(degree(config.fsdp.shard_degree) or 0, config.fsdp.replicate_degree, world_size)
    longest, stored = shapes.longest(config.data.max_length), (*quantized, *edges)
    settings = storage_settings(config, batch, shard, casts, longest)
    table = shapes.embedding if shapes.tied else shapes.head
    settings = replace(settings, quantized_head=any(x.linear.name == table for x in edges))
    offloaded = offloaded_parameters(
        config.fsdp.offload_modules, shapes, {x.linear.parameter for x in stored}, {x.linear.name for x in stored}
    )
    by_name = _by_name(shapes, targets)
    adapted = [by_name[name] for name in targets]
    start = _start(asked_for, lora, adapted, quantized, settings)
    cost = _adapter_cost(method, adapted, shapes, lora, settings.itemsize, start)
    memory = MemoryModel(shapes, stored, trained, settings, offloaded, replace(cost, rows=rows))
    _require_recomputable(config, memory)
    settings, choices = choose(config, memory, settings, budget)
    planned = memory.plan(settings)
    return TrainPlan(
        world_size=world_size,
        shard_size=settings.shard_size,
        quantized=quantized,
        quantized_edges=edges,
        targets=targets,
        parameters=parameters,
        modules=modules,
        units=() if settings.keeps_whole else fsdp_units(shapes),
        batch=batch,
        bytes=planned.bytes,
        moments=planned.moments,
        host=planned.host,
        trainable_parameters=memory.trainable(),
        base_parameters=sum(prod(shape) for shape in shapes.parameters.values()),
        offloaded=offloaded,
        memory=memory,
        settings=settings,
        choices=choices,
        start=start,
    )


def _targets(
    lora: LoraSettings, shapes: ModelShapes, modules: Sequence[str]
) -> tuple[tuple[str, ...], tuple[LinearShape, ...], LoraSettings]:
    """Return the linears and the stacked weights that get adapters, and the settings with whole names for patterns.

    ``modules`` are trained whole: ``all-linear`` leaves them out.
    """
    if lora.trains_base or not (lora.target_modules or lora.target_parameters):
        if modules and not lora.trains_base:
            raise PlanError("lora.modules_to_save: trains modules beside adapters; lora.target_modules names none.")
        return (), (), lora
    targets = target_linears(shapes, lora.target_modules, lora.exclude_modules, lora.layers_to_transform)
    if lora.target_modules == "all-linear":
        targets = tuple(name for name in targets if name not in modules)
    require_apart(modules, targets, "lora.target_modules")
    if not targets:
        raise PlanError("lora.modules_to_save: leaves no linear for an adapter; train the base (lora=none), or fewer.")
    parameters = target_parameters(shapes, lora.target_parameters, lora.exclude_modules, lora.layers_to_transform)
    require_apart(modules, (x.name.rpartition(".")[0] for x in parameters), "lora.target_parameters")
    if lora.starts_from_rows:  # its ranks are settled later, and are these at most
        lora = bounded(lora, [linear for linear in shapes.linears if linear.name in set(targets)])
    return targets, parameters, spelt_out(lora, [*targets, *(x.name for x in parameters)])


def _start(
    asked_for: LoraSettings, lora: LoraSettings, targets: Sequence[LinearShape], quantized: Sequence[Packed],
    settings: StorageSettings,
) -> StartCost | None:  # fmt: skip
    """Return what the adapters' start costs: as asked for, or with whole names for patterns."""
    if asked_for.starts_from_rows:
        return rows_cost(asked_for, targets, settings.tokens, settings.itemsize, settings.on_accelerator)
    return start_cost(lora, targets, {x.linear.name for x in quantized})


def _trained(
    config: RunConfig, method: Method, shapes: ModelShapes, targets: Sequence[str], parameters: Sequence[LinearShape],
    modules: Sequence[str], quantized: Sequence[Packed],
) -> tuple[dict[str, dict[str, tuple[int, ...]]], bool]:  # fmt: skip
    """Return module -> name -> shape of everything that is trained, but rows of tokens; and whether FSDP casts it.

    It must cast what is trained beside our own layers for linears, see `_may_stay_whole`.
    """
    if method.trains_base:
        return whole_base(shapes), False
    tables = [name for name in targets if name in (shapes.embedding, shapes.head)]
    of_images = [name for name in targets if name in shapes.beside]
    _require_adaptable(config, method, [*tables, *of_images], bool(tables))
    dense = {*tables, *of_images} - {x.linear.name for x in quantized}
    by_name, lora = _by_name(shapes, targets), config.lora
    trained = {name: parameters_of(method, by_name[name], lora) for name in targets}
    trained |= experts_parameters(method, parameters, lora)
    beside = whole_parameters(shapes, modules) | trained_biases(shapes, lora.bias, targets, modules)
    trained |= {name: trained.get(name, {}) | tensors for name, tensors in beside.items()}
    if config.quant.embeddings != NONE and shapes.head in beside and shapes.head not in modules:
        raise PlanError("lora.bias: the bias of a quantized head is not trained; set quant.embeddings=none.")
    return trained, bool(dense or beside)


def _quantized(
    config: RunConfig, shapes: ModelShapes, modules: Sequence[str]
) -> tuple[tuple[Packed, ...], tuple[Packed, ...]]:
    """Return what is stored quantized in the decoder layers, and of embedding and head: nothing that is trained."""
    dense = parameters_in(shapes, modules)
    linears, edges = chosen_linears(config.quant, shapes), chosen_edges(config.quant, shapes)
    return (
        tuple(x for x in linears if x.linear.parameter not in dense),
        tuple(x for x in edges if x.linear.parameter not in dense),
    )


def _require_recomputable(config: RunConfig, memory: MemoryModel) -> None:
    asked_for = asked(config.train.activation_checkpointing)
    if not memory.shapes.recomputes and asked_for not in (None, "none"):
        raise PlanError(
            f"train.activation_checkpointing: the class of this model cannot recompute its layers; {asked_for} is not "
            "possible, set it to none or auto."
        )
    if memory.offloaded_inside and config.train.activation_checkpointing == "selective":
        raise PlanError(
            "train.activation_checkpointing: selective does not work with fsdp.offload_modules inside decoder layers "
            "(they would have to be copied in again to recompute, which torch does not track); set it to full or none."
        )


def _by_name(shapes: ModelShapes, targets: Sequence[str]) -> dict[str, LinearShape]:
    edges = edge_shapes(shapes) if {shapes.embedding, shapes.head}.intersection(targets) else ()
    return {linear.name: linear for linear in (*edges, *shapes.linears)}


def _require_adaptable(config: RunConfig, method: Method, dense: Sequence[str], tables: bool) -> None:
    """Check that modules outside the decoder layers can have an adapter; ``tables``: some are embedding or head."""
    if not dense:
        return
    lora, fsdp = config.lora, config.fsdp
    for key, given in {
        f"lora.variant={method.name}": method.name not in WITH_TABLES,
        f"lora.init_lora_weights={lora.start}": lora.start is not None,
        f"quant.embeddings={config.quant.embeddings}": tables and config.quant.embeddings != NONE,
        "model.add_tokens": config.model.add_tokens,
        "fsdp.offload_modules": fsdp.offload_modules,
        f"fsdp.offload={fsdp.offload}": tables and fsdp.offloads_parameters,
        "fsdp.adapters=replicated": fsdp.adapters == "replicated" and config.precision.name == "bf16",
    }.items():  # fmt: skip
        if given:
            raise PlanError(
                f"lora.target_modules: an adapter on {dense[0]} does not go with {key}; leave one of them out."
            )


def _token_rows(
    config: RunConfig, shapes: ModelShapes, method: Method, modules: Sequence[str]
) -> dict[str, tuple[int, int]]:
    rows = token_rows(shapes, len(config.model.add_tokens))
    if rows and (both := next((name for name in tables_of_tokens(shapes) if name in modules), None)):
        raise PlanError(
            f"lora.modules_to_save: {both} would be trained whole, and model.add_tokens trains rows of it; leave one "
            "of them out."
        )
    if rows and not hasattr(method.config, "trainable_token_indices"):
        raise PlanError(
            f"model.add_tokens: PEFT's config of lora.variant={method.name} has no place for them; leave them out."
        )
    return rows


def _micro_batch_rows(config: RunConfig) -> int:
    """Return the rows of a micro-batch; of one that is given in tokens, the worst case: all rows at maximum length."""
    if config.train.micro_batch_tokens:
        return max(1, config.train.micro_batch_tokens // config.data.max_length)
    return config.train.micro_batch_size


def _adapter_cost(
    method: Method, targets: Sequence[LinearShape], shapes: ModelShapes, lora: LoraSettings, itemsize: int,
    start: StartCost | None,
) -> AdapterCost:  # fmt: skip
    kept = {linear.name: method.kept(linear, of_target(lora, linear.name)) for linear in targets}
    layers = [[each for name, each in kept.items() if name.startswith(layer + ".")] for layer in shapes.layers]
    most = max(layers, key=lambda layer: (sum(x.a_token for x in layer), sum(x.fixed for x in layer)), default=[])
    return AdapterCost(
        method.fixed_bytes(targets, lora, itemsize), tuple(most),
        frozenset(name for name, each in kept.items() if not each.input), 0 if start is None else start.bytes,
        {name: each for name, each in kept.items() if name in shapes.beside},
    )  # fmt: skip


def _require_matches(config: RunConfig, trained: Mapping[str, tuple[int, ...]]) -> None:
    if odd := unmatched(config.optim.override_32bit, trained):
        raise PlanError(
            f"optim.override_32bit: {', '.join(map(repr, odd))} matches none of the {len(trained)} trained parameters; "
            f"they are named like {next(iter(trained))!r}, and a pattern must match the whole name (*.q_proj.*)."
        )
    if config.optim.loraplus_lr_ratio and not any(is_faster(name, shape) for name, shape in trained.items()):
        raise PlanError(
            f"optim.loraplus_lr_ratio: is for matrices B and vectors, and lora.variant={config.lora.variant} trains "
            f"neither (its tensors are named like {next(iter(trained))!r}); set it to 0."
        )


def _may_stay_whole(config: RunConfig, casts: bool) -> bool:
    """Whether a rank can keep all parameters on its device as they are, without FSDP.

    It cannot if some are in host memory, or if FSDP's cast to bf16 is needed: by PEFT's own layers, or by what else is
    trained (``casts``).
    """
    quant, fsdp = config.quant, config.fsdp
    in_peft = "none" in (quant.name, *quant.overrides.values()) or config.debug.name == "plain"
    in_peft = in_peft or build_method(config.lora.method).layer is None
    in_peft = casts or (in_peft and bool(config.lora.target_modules or config.lora.target_parameters))
    return not (fsdp.offloads_parameters or fsdp.offload_modules or (in_peft and config.precision.name == "bf16"))


def storage_settings(
    config: RunConfig, batch: BatchPlan, shard_size: int, casts: bool, max_length: int
) -> StorageSettings:
    """Return the settings that determine memory; ``casts``: see `_may_stay_whole`, ``max_length`` of rows."""
    keeps_whole = shard_size == 1 and _may_stay_whole(config, casts)
    return StorageSettings(
        shard_size=shard_size,
        on_accelerator=(asked(config.launcher.device) or "cpu") != "cpu",
        keeps_whole=keeps_whole,
        itemsize=2 if config.precision.name == "bf16" else 4,
        lora=config.lora,
        optim=config.optim,
        micro_batch_size=batch.micro_batch_size,
        max_length=max_length,
        checkpointing=asked(config.train.activation_checkpointing) or "none",
        attention=config.model.attn_implementation,
        restarting=config.data.packing or config.data.padding_free,
        logits_chunk=config.train.logits_chunk,
        offload_parameters=config.fsdp.offloads_parameters,
        offload_activations=config.fsdp.offloads_activations,
        prefetch=config.fsdp.prefetch,
        reshard_after_forward=switch(config.fsdp.reshard_after_forward) is not False,
        cache_dequantized=switch(config.quant.cache_dequantized) is True,
        accumulation_steps=batch.accumulation_steps,
        adapter_copies=batch.num_ranks if keeps_whole or config.fsdp.adapters == "replicated" else 0,
    )
