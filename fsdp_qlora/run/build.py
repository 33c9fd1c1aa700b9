"""Builds a sharded model from its folder: opens it, quantizes, adds adapters, shards, and loads the weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.based import require_base
from fsdp_qlora.adapters.full import train_base
from fsdp_qlora.adapters.init_from import start_from_adapter
from fsdp_qlora.adapters.linear import use_fused_products
from fsdp_qlora.adapters.lora import AdaptedModel, attach_adapters, initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.norms import follow_adapters
from fsdp_qlora.adapters.served import ServedAdapter, attach_served, load_served
from fsdp_qlora.adapters.turns import TakingTurns
from fsdp_qlora.adapters.whole import train_parameters
from fsdp_qlora.config.auto import as_word, asked, switch
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.errors import ModelError
from fsdp_qlora.heads.added import add_token_rows, start_token_rows
from fsdp_qlora.heads.quantized import quantize_edges
from fsdp_qlora.heads.upstream import AfterHead, after_head
from fsdp_qlora.load.buffers import persistent_buffers
from fsdp_qlora.load.conversions import arrangement
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.inventory import take_stock
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stream import LoadReport, Progress, stream_weights
from fsdp_qlora.model.experts import use_experts_forward
from fsdp_qlora.model.families import decoder_layers, language_task, task_type
from fsdp_qlora.model.fused import fusible, swap_fused
from fsdp_qlora.model.heads import compute, draw_new, drawn_modules, head_modules
from fsdp_qlora.model.kernels import KERNELS, Kernels
from fsdp_qlora.model.replaceable import kept_linears
from fsdp_qlora.model.root import CausalModel, install_loss_head
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.parallel.compile import compile_layers, want_input_gradient
from fsdp_qlora.parallel.compile_cache import settle_compile_caches
from fsdp_qlora.parallel.copy_ahead import copy_ahead, copy_modules_ahead
from fsdp_qlora.parallel.offload import offload_activations
from fsdp_qlora.parallel.recompute import checkpoint_activations
from fsdp_qlora.parallel.shard import (
    host_modules,
    keep_on_host,
    keep_whole,
    mixed_precision,
    model_dtype,
    reach_all_experts,
    reach_beside_texts,
    require_sharded,
    set_prefetch,
    shard_model,
    skip_gather_in_backward,
    stay_gathered,
    untie_across,
)
from fsdp_qlora.plan.choices import decided
from fsdp_qlora.plan.plan import TrainPlan, make_plan
from fsdp_qlora.quant.backend import bitsandbytes_backend
from fsdp_qlora.quant.swap import keep_dense, swap_linears
from fsdp_qlora.run.decide import require_kernels, shapes_to_plan, skeleton, with_head, with_rows
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.shapes.tokens import TOKEN_ROWS

_log = logging.getLogger(__name__)

Weights = Callable[[Path], SafetensorsFolder]
"""Opens the weights of a model's folder."""


@dataclass(frozen=True)
class OpenedModel:
    """Everything about a model except its weights."""

    config: RunConfig
    """The settings with every ``auto`` resolved."""
    base: PreTrainedModel
    """The model on the meta device, as transformers builds it."""
    source: SafetensorsFolder
    shapes: ModelShapes
    plan: TrainPlan
    first_added: int | None = None
    """Id of the first added token; None: after all rows of the base."""

    @property
    def origin(self) -> Base:
        """The files that the base comes from, and its formats."""
        return Base(self.source, self.shapes, self.plan.quantized)

    @property
    def repairs(self) -> tuple[str, ...]:
        """Fixes since early 0.1.0 that change this model's losses, so that runs from before them cannot resume."""
        rope = getattr(self.base.config.get_text_config(), "rope_parameters", None) or {}
        applies = {
            "buffers of the files are loaded": bool(persistent_buffers(self.base)),
            "float32 parameters stay in float32": bool(self.shapes.float32),
            "rotary factors are chosen once by data.max_length": rope.get("rope_type") == "longrope",
            "linears that other code reads are not quantized": bool(kept_linears(self.base, self.shapes.layers)),
        }
        return tuple(name for name, does in applies.items() if does)

    def without_adapters(self, ranks: Ranks, budget: int | None) -> OpenedModel:
        """Return a copy to answer with the base alone."""
        config = replace(self.config, lora=LoraSettings(target_modules=[]))
        plan = replace(make_plan(config, self.shapes, ranks.size, budget), choices=self.plan.choices)
        return replace(self, config=config, plan=plan)

    def for_run(self, config: RunConfig, ranks: Ranks, budget: int | None) -> OpenedModel:
        """Return a copy for ``config``, the settings that it was opened with, but for the numbers of the run."""
        lora = replace(config.lora, modules_to_save=self.config.lora.modules_to_save)  # with a new head
        data = replace(config.data, max_length=self.config.data.max_length)
        config = replace(config, lora=lora, objective=self.config.objective, data=data)
        plan = make_plan(config, self.shapes, ranks.size, budget)
        return replace(self, config=decided(config, plan.settings), plan=plan)

    def to_answer(self) -> OpenedModel:
        """Return a copy that trains nothing: on one rank the base is kept whole, whatever adapts it.

        In training, PEFT's own layers in bf16 need FSDP's cast of their float32 adapters, and with it FSDP copies every
        weight in every forward (ADR 0015). To answer, `cast_adapters` makes the cast once.
        """
        plan, fsdp = self.plan, self.config.fsdp
        if plan.shard_size > 1 or fsdp.offloads_parameters or fsdp.offload_modules:
            return self
        return replace(self, plan=replace(plan, settings=replace(plan.settings, keeps_whole=True), units=()))

    def compiled(self, on: bool) -> OpenedModel:
        """Return a copy with ``train.compile`` resolved to ``on``."""
        train = replace(self.config.train, compile=as_word(on))
        return replace(self, config=replace(self.config, train=train))


def open_model(
    config: RunConfig, folder: Path, ranks: Ranks, budget: int | None, say: bool = True,
    weights: Weights = SafetensorsFolder,
) -> OpenedModel:  # fmt: skip
    """Open everything about a model except its weights, so that errors show before any long work begins.

    Args:
        config: the settings, with the attention implementation resolved (`check_model`).
        folder: the base model.
        ranks: the ranks of the run.
        budget: bytes that a rank's tensors may take; None = unknown.
        say: whether rank 0 logs which tensors of the files are left out.
        weights: opens the folder's weights.

    Raises:
        ModelError: if the model cannot be built, or its files lack something that it needs.
        PlanError: if the settings do not suit the model.
    """
    base = skeleton(config, folder)
    config = with_rows(config, folder, base)
    objective = build_objective(config.objective)
    source = weights(folder)
    source.arrange(arrangement(base, source.entries))
    shapes = shapes_to_plan(config, base, folder)
    new_head = objective.trains_head or objective.may_lack_head
    stock = take_stock(base, source, shapes.layers, new_head, objective.ignores_head)
    if (line := stock.describe()) and ranks.is_main and say:
        _log.info("%s: %s", config.model.name, line)
    if config.data.train is not None and objective.of_tokens and task_type(base) != "CAUSAL_LM":
        raise ModelError(
            f"model.name: a {type(base).__name__} is not a causal language model, and objective="
            f"{objective.name} trains only those. Choose another objective, or load it for a loop of your own "
            "(`prepare` without data)."
        )
    source.drawn = compute(base, stock.computed)
    if objective.trains_head or stock.drawn:
        drawn = draw_new(base, stock.drawn, config.run.seed)
        source.drawn |= drawn
        whole = head_modules(base, stock.drawn) if objective.trains_head else drawn_modules(base, drawn)
        config = with_head(config, whole)
    plan = make_plan(config, shapes, ranks.size, budget)
    if plan.quantized or plan.quantized_edges:
        bitsandbytes_backend(ranks.device)
    resolved = decided(config, plan.settings)
    require_kernels(resolved, base, ranks.device)
    return OpenedModel(resolved, base, source, shapes, plan)


def load_model(
    opened: OpenedModel, ranks: Ranks, progress: Progress | None = None, kept: Path | None = None,
    served: Sequence[ServedAdapter] = (),
) -> tuple[CausalModel, LoadReport]:  # fmt: skip
    """Quantize, adapt and shard an opened model, then load its weights and initialize its adapters.

    ``kept`` is a file of factors from which adapters start (`fsdp_qlora.adapters.turns`); None: they are computed.
    With ``served``, the adapters are these, filled from their folders and frozen.
    """
    config = opened.config
    if config.lora.init_from is not None:
        require_adapter(Path(config.lora.init_from).expanduser(), opened, ranks)
    model = build_sharded(
        config, opened.base, opened.shapes, opened.plan, ranks, first_added=opened.first_added, served=served
    )
    shards_on = HOST if config.fsdp.offloads_parameters else ranks.device
    on_host = host_modules(model.base, opened.plan.offloaded)
    turns = None if config.lora.start is None else TakingTurns(model, config.lora, config.run.seed, ranks, kept)
    report = stream_weights(
        model, model.base, opened.source, ranks, progress, shards_on, on_host, turns or iter,
        opened.plan.memory.masters,
    )  # fmt: skip
    if turns is not None:
        model.starts = turns.starts
    if served:
        load_served(model, served, ranks)
    else:
        initialize_adapters(model, config.run.seed, ranks.shard_rank, ranks.shard_size, config.lora)
    start_token_rows(model.base, opened.shapes, opened.source, ranks)
    if config.lora.init_from is not None:
        start_from_adapter(Path(config.lora.init_from).expanduser(), config.lora, model, ranks)
    follow_adapters(model)
    if opened.plan.settings.keeps_dense:
        keep_dense(opened.base, model_dtype(config.precision.name))
    return model, report


def require_adapter(folder: Path, opened: OpenedModel, ranks: Ranks) -> None:
    """Check that an adapter is one for this model, before weights are read, and log what is not known. A collective.

    Raises:
        ModelError: as `require_base`.
    """
    said = on_every(lambda: require_base(folder, opened.origin, opened.config.model.name), ranks)
    for line in said if ranks.is_main else []:
        _log.warning(line)


def build_sharded(
    config: RunConfig,
    base: PreTrainedModel,
    shapes: ModelShapes,
    plan: TrainPlan,
    ranks: Ranks,
    host: torch.device = HOST,
    before_sharding: Callable[[nn.Module], None] = lambda base: None,
    first_added: int | None = None,
    served: Sequence[ServedAdapter] = (),
) -> CausalModel:
    """Swap, adapt and shard a meta model as planned; the order matters (see docs/architecture.md).

    ``before_sharding`` is called with the adapted base model. ``served`` replaces the adapter to train by several
    others; ``config.lora`` must be the settings of the first.
    ``config`` must have every ``auto`` resolved (`decided`, `prepare`); options still at ``auto`` are not applied.
    """
    task = language_task(base)
    after = after_head(base) if task == "CAUSAL_LM" or build_objective(config.objective).uses_head else None
    float32 = [parameter for name, parameter in base.named_parameters() if name in shapes.float32]
    adapted = _adapt_and_quantize(config, base, plan, shapes, task, served)
    train_parameters(base, plan.memory.masters)
    fused = _use_kernels(config, base, after)
    model = CausalModel(adapted)
    model.fused = fused
    add_token_rows(base, shapes, first_added, len(config.model.add_tokens))
    if config.debug.name != "plain":
        use_fused_products(model)
    units = [[base.get_submodule(name) for name in unit] for unit in plan.units]
    if (kind := config.train.activation_checkpointing) in ("selective", "full"):
        checkpoint_activations(base, kind)
    layers, fsdp = decoder_layers(base), config.fsdp
    if fsdp.offloads_activations:
        offload_activations(layers, ranks.device, host=host)
    untie_across(base, units)
    before_sharding(base)
    policy = mixed_precision(config.precision.name)
    keeps_whole = plan.settings.keeps_whole
    replicated = keeps_whole or fsdp.adapters == "replicated"
    whole = (p for name, p in trainable_parameters(model) if replicated or name.endswith(TOKEN_ROWS))
    unsharded = [*float32, *whole]
    on_host = host_modules(base, plan.offloaded)
    keep_on_host(on_host)
    if keeps_whole:
        keep_whole(model, ranks, policy)
    else:
        shard_model(model, units, ranks, policy, True, fsdp.offloads_parameters, unsharded, on_host)
    if switch(config.train.compile) is True:
        settle_compile_caches(os.environ)
        kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
        model.compiled_layers = compile_layers(layers, kinds)
    _reach_all(config, base, layers, ranks)
    _settle_gathers(config, base, layers, plan, ranks)
    if model.compiled:
        want_input_gradient(base.get_input_embeddings())
    for method in ("generate", "logits", "losses", "outputs"):
        register_fsdp_forward_method(model, method)
    require_sharded(model, ranks, replicated)
    return model


def _reach_all(config: RunConfig, base: PreTrainedModel, layers: Sequence[nn.Module], ranks: Ranks) -> None:
    """Let every forward reach whatever is trained, so that all ranks reduce the same gradients."""
    if ranks.size > 1:
        reach_all_experts(layers)
    if build_objective(config.objective).reads == "texts with images":
        reach_beside_texts(base)


def _settle_gathers(
    config: RunConfig, base: PreTrainedModel, layers: Sequence[nn.Module], plan: TrainPlan, ranks: Ranks
) -> None:
    """Set when the units of a sharded model are gathered, and how long they stay so.

    ``layers`` were found before it was sharded, since FSDP changes the names of classes, by which they are told.
    """
    edges, fsdp = (base.get_input_embeddings(), base.get_output_embeddings()), config.fsdp
    if switch(fsdp.reshard_after_forward) is False:
        stay_gathered(layers)
        if plan.settings.edges_stay:
            stay_gathered(edge for edge in edges if edge is not None)
    set_prefetch(layers, fsdp.prefetch)
    if fsdp.offloads_parameters and ranks.shard_size == 1:
        copy_ahead(layers, fsdp.prefetch, ranks.device)
    elif ranks.shard_size == 1:
        copy_modules_ahead(layers, host_modules(base, plan.offloaded), edges[0], fsdp.prefetch, ranks.device)
    there = [edge for edge in edges if edge is not None]
    skip_gather_in_backward([there] if plan.memory.shapes.tied else [[edge] for edge in there])


def _use_kernels(config: RunConfig, base: PreTrainedModel, after: AfterHead | None) -> str:
    """Let ``train.kernels`` compute what it can in a meta model, and install the loss head; return what it computes."""
    kernels = KERNELS[asked(config.train.kernels) or Kernels.name]()
    kernels.begin()
    compiled = switch(config.train.compile) is True  # whole layers, with the norms and MLPs in them
    dtype = model_dtype(config.precision.name)
    fused = fusible(base, kernels, dtype, decoder_layers(base) if compiled else ())
    swap_fused(base, fused)
    loss = after is not None and install_loss_head(base, after, config.train.logits_chunk, kernels.cross_entropy)
    if kernels.name == Kernels.name:
        return ""
    return f"{', outside the compiled layers' if compiled else ''}: {fused.describe(loss)}"


def _adapt_and_quantize(
    config: RunConfig, base: PreTrainedModel, plan: TrainPlan, shapes: ModelShapes, task: str | None,
    served: Sequence[ServedAdapter],
) -> AdaptedModel | PreTrainedModel:  # fmt: skip
    """Add adapters, and quantize the linears: first those under PEFT's own layers, which go on linears they know.

    With ``lora=none``, the base is what is trained. To use the base alone, nothing is added.
    """
    if config.lora.trains_base:
        return train_base(base)
    attach = partial(attach_adapters, base, plan.targets, config.lora, task, plan.parameters)
    if served:
        attach = partial(attach_served, base, shapes, served, task)
    quantize = partial(_quantize, base, plan, shapes, switch(config.quant.cache_dequantized) is True)
    if not (plan.targets or plan.parameters or served):
        base.requires_grad_(False)
        quantize()
        return base
    if build_method(config.lora.method).layer is None:
        adapted = attach()
        quantize()
        return adapted
    quantize()
    return attach()


def _quantize(base: PreTrainedModel, plan: TrainPlan, shapes: ModelShapes, cache: bool) -> None:
    """Replace the modules planned for quantization by modules with packed parameters."""
    swap_linears(base, plan.quantized, cache_dequantized=cache)
    if plan.parameters or any(x.linear.stacked for x in plan.quantized):  # no other forward asks for adapters
        use_experts_forward(base)
    if plan.quantized_edges:
        quantize_edges(base, shapes, plan.quantized_edges)
