"""The story of a run in two calls: `prepare` makes the sharded model real, `fit` trains it (fit.py)."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import LoraSettings, ModelSettings, RunConfig
from fsdp_qlora.data.prepare import PreparedData, prepare_data
from fsdp_qlora.dist.mesh import Ranks, build_ranks
from fsdp_qlora.dist.nodes import once_per_node
from fsdp_qlora.dist.process import (
    Placement,
    choose_device,
    keep_freed_memory,
    process_group,
    set_threads,
    use_device,
)
from fsdp_qlora.dist.reduce import any_rank, on_every
from fsdp_qlora.dist.watch import Phases
from fsdp_qlora.errors import DataError, ModelError
from fsdp_qlora.export.adapter import load_adapter, read_adapter_config, start_from_adapter
from fsdp_qlora.model.activations import checkpoint_activations
from fsdp_qlora.model.causal import CausalModel, install_loss_head
from fsdp_qlora.model.compile import compile_layers, want_input_gradient
from fsdp_qlora.model.conversions import arrangement
from fsdp_qlora.model.experts import use_quantized_experts
from fsdp_qlora.model.lora import attach_lora, initialize_adapters, trainable_parameters, use_fused_products
from fsdp_qlora.model.offload import HOST, offload_activations
from fsdp_qlora.model.quant_head import quantize_edges
from fsdp_qlora.model.shard import (
    host_modules,
    keep_on_host,
    mixed_precision,
    require_sharded,
    set_prefetch,
    shard_model,
    skip_gather_in_backward,
    stay_gathered,
)
from fsdp_qlora.model.skeleton import (
    build_tokenizer,
    decoder_layers,
    needs_hub,
    read_shapes,
    resolve_folder,
    task_type,
)
from fsdp_qlora.model.stream import LoadReport, Progress, stream_weights, verify_gather
from fsdp_qlora.model.weights import SafetensorsFolder
from fsdp_qlora.plan.choices import Compilation, decided
from fsdp_qlora.plan.layout import ModelShapes
from fsdp_qlora.plan.plan import TrainPlan, make_plan
from fsdp_qlora.planning import compilation_for, rank_budget, skeleton, with_attention
from fsdp_qlora.quant.backend import bitsandbytes_backend
from fsdp_qlora.quant.formats import QuantFormat
from fsdp_qlora.quant.swap import swap_linears


def cache_folder() -> Path:
    """Return where prepared data and the embedded model are kept: $FSDP_QLORA_CACHE or ~/.cache/fsdp_qlora."""
    return Path(os.environ.get("FSDP_QLORA_CACHE", "~/.cache/fsdp_qlora")).expanduser()


@dataclass
class Prepared:
    """A sharded model with its weights loaded, and what belongs to it."""

    config: RunConfig
    plan: TrainPlan
    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    folder: Path
    """Folder of the base model."""
    shapes: ModelShapes
    load: LoadReport
    data: PreparedData | None
    threads: int
    phases: Phases
    choices: dict[str, str] = field(default_factory=dict)
    """What the plan and the device decided of what was left to them (``auto``), by key, and why."""
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def mesh(self) -> DeviceMesh:
        """The device mesh the model is sharded over."""
        return self.ranks.mesh

    @property
    def peft_model(self) -> PeftModel:
        """The transformers model with its adapters."""
        assert isinstance(self.model.model, PeftModel)
        return self.model.model

    def close(self) -> None:
        """Leave the process group."""
        self._stack.close()


@dataclass(frozen=True)
class World:
    """The open process group and this process's place in it."""

    ranks: Ranks
    placement: Placement
    threads: int
    stack: ExitStack
    phases: Phases = field(default_factory=Phases)
    """What this rank is doing, for the watch that names a rank which holds up the others."""


def open_world(config: RunConfig) -> World:
    """Choose the device, open the process group and build the mesh (torchrun's environment, or one process)."""
    placement = Placement.from_env()
    device = choose_device(config.launcher.device, placement)
    use_device(device)
    threads = set_threads(config.launcher.threads_per_rank, placement.local_world_size)
    if device.type == "cpu":
        keep_freed_memory(config.launcher.keep_freed_memory)
    stack = ExitStack()
    group = stack.enter_context(process_group(device, placement, config.launcher.timeout_seconds))
    ranks = build_ranks(group, device, config.fsdp.shard_degree, config.fsdp.replicate_degree)
    atexit.register(_abandon)
    return World(ranks, placement, threads, stack)


def _abandon() -> None:
    """Leave the group without waiting for the others: a script that ends on an error must not hang them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare(
    config: RunConfig, world: World | None = None, progress: Progress | None = None, training: bool = True
) -> Prepared:
    """Build, quantize, adapt, shard and fill the model; tokenize the data if any are named.

    Call it under torchrun on every rank, or on one process. Close the result when done with it. Without ``training``
    nothing is done that only pays in training (compiled layers).
    """
    check(config)
    world = world or open_world(config)
    ranks = world.ranks
    folder = _find_model(config.model, world)
    budget = rank_budget(world.ranks, world.placement)
    resolved, base, source, shapes, plan, tokenizer = on_every(
        lambda: _open_model(config, folder, ranks, budget), ranks
    )
    data = None
    if config.data.train is not None:
        mine = world.placement.local_rank == 0
        data = prepare_data(config.data, config.run.seed, tokenizer, cache_folder(), mine)
    world.phases.enter("loading the model")
    compilation = (
        compilation_for(config, base, plan, data, ranks.device) if training else Compilation(False, "no training")
    )
    resolved = replace(resolved, train=replace(resolved.train, compile="true" if compilation.on else "false"))
    model = build_sharded(resolved, base, shapes, plan, world.ranks)
    shards_on = HOST if config.fsdp.offloads_parameters else world.ranks.device
    on_host = host_modules(model.base, plan.offloaded)
    report = stream_weights(model, model.base, source, world.ranks, progress, shards_on, on_host)
    initialize_adapters(model, config.run.seed, world.ranks.shard_rank, world.ranks.shard_size)
    if config.lora.init_from is not None:
        start_from_adapter(Path(config.lora.init_from).expanduser(), config.lora, model, world.ranks)
    world.phases.enter("comparing what the ranks gather")
    verify_gather(model, world.ranks)
    return Prepared(
        config, plan, model, tokenizer, world.ranks, folder, shapes, report, data, world.threads, world.phases,
        {**plan.choices, "model.attn_implementation": resolved.model.attn_implementation,
         "train.compile": f"{'true' if compilation.on else 'false'} ({compilation.why})"},
        world.stack,
    )  # fmt: skip


def _find_model(model: ModelSettings, world: World) -> Path:
    """Return the base model's folder; one process of each node downloads it where it is on the hub."""
    ranks = world.ranks
    if not any_rank(needs_hub(model.name), ranks):
        return on_every(lambda: resolve_folder(model.name, model.revision), ranks)

    def download() -> str:
        return str(resolve_folder(model.name, model.revision))

    def say(line: str) -> None:
        if ranks.is_main:
            print(f"{model.name}: {line}", flush=True)

    return Path(once_per_node(download, ranks, world.placement.local_rank, say))


def _open_model(
    config: RunConfig, folder: Path, ranks: Ranks, budget: int
) -> tuple[RunConfig, PreTrainedModel, SafetensorsFolder, ModelShapes, TrainPlan, PreTrainedTokenizerBase]:
    """Open all of a model but its weights: what is wrong with it shows before the data are tokenized."""
    config = with_attention(config, ranks.device, folder)
    base = skeleton(config, folder)
    source = SafetensorsFolder(folder)
    source.arrange(arrangement(base, source.entries))
    shapes = read_shapes(base)
    if config.data.train is not None and task_type(base) != "CAUSAL_LM":
        raise ModelError(
            f"model.name: a {type(base).__name__} is no causal language model, and objective=sft trains only those. It "
            "can be planned and loaded, and trained by a loop of your own (`prepare` without data)."
        )
    plan = make_plan(config, shapes, ranks.size, budget)
    if plan.quantized or plan.quantized_edges:
        bitsandbytes_backend(ranks.device)
    return decided(config, plan.settings), base, source, shapes, plan, _tokenizer(config, folder)


def load_for_inference(config: RunConfig, adapter: Path | None = None, world: World | None = None) -> Prepared:
    """Load a base model in the settings' format, with a PEFT adapter on it if one is named.

    The adapter's own config decides rank, scaling and targets, and the base model where ``config.model.name`` is empty.

    Raises:
        ModelError: if the folder is no LoRA adapter, or not one for this model.
    """
    if adapter is not None:
        found = read_adapter_config(adapter)
        name = config.model.name or found.base_model_name_or_path or ""
        targets = found.target_modules
        lora = LoraSettings(
            variant="rslora" if found.use_rslora else "lora",
            r=found.r,
            alpha=found.lora_alpha,
            target_modules=targets if isinstance(targets, str) else sorted(targets or []),
        )
        config = replace(config, model=replace(config.model, name=name), lora=lora)
    prepared = prepare(config, world, training=False)
    if adapter is not None:
        load_adapter(adapter, prepared.model, prepared.ranks.shard_rank, prepared.ranks.shard_size)
    prepared.model.eval()
    return prepared


def prepare_tokens(config: RunConfig, progress: Callable[[int], None] | None = None) -> PreparedData:
    """Tokenize the data alone: no model, no process group. ``progress`` takes the rows read so far."""
    check(config)
    tokenizer = _tokenizer(config, resolve_folder(config.model.name, config.model.revision))
    return prepare_data(config.data, config.run.seed, tokenizer, cache_folder(), progress=progress)


def _tokenizer(config: RunConfig, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer(folder, config.model.trust_remote_code)
    if config.data.template is not None:
        try:
            tokenizer.chat_template = Path(config.data.template).expanduser().read_text()
        except OSError as error:
            raise DataError(f"data.template: {config.data.template} cannot be read: {error.strerror}.") from error
    return tokenizer


def build_sharded(
    config: RunConfig,
    base: PreTrainedModel,
    shapes: ModelShapes,
    plan: TrainPlan,
    ranks: Ranks,
    host: torch.device = HOST,
) -> CausalModel:
    """Swap, adapt and shard a meta model as planned; the order is the point (see docs/architecture.md).

    ``config`` has every ``auto`` decided (`decided`, `prepare`); what is left at ``auto`` is not done.
    """
    _quantize(base, plan, shapes, config.quant.cache_dequantized == "true")
    task, lora = task_type(base), config.lora
    if task == "CAUSAL_LM":
        install_loss_head(base, config.train.logits_chunk)
    model = CausalModel(attach_lora(base, plan.targets, lora.r, lora.alpha, lora.dropout, lora.variant, task))
    if config.debug.name != "plain":
        use_fused_products(model)
    units = [[base.get_submodule(name) for name in unit] for unit in plan.units]
    if (kind := config.train.activation_checkpointing) in ("selective", "full"):
        checkpoint_activations(base, kind)
    layers, fsdp = decoder_layers(base), config.fsdp
    if config.train.compile == "true":
        model.compiled_layers = compile_layers(
            layers, getattr(base.config.get_text_config(), "layer_types", None) or ()
        )
    if fsdp.offloads_activations:
        offload_activations(layers, ranks.device, host=host)
    policy = mixed_precision(config.precision.name)
    replicated = [p for _, p in trainable_parameters(model)] if fsdp.adapters == "replicated" else []
    on_host = host_modules(base, plan.offloaded)
    keep_on_host(on_host)
    shard_model(model, units, ranks, policy, True, fsdp.offloads_parameters, replicated, on_host)
    if fsdp.reshard_after_forward == "false":
        stay_gathered(layers)
    set_prefetch(layers, fsdp.prefetch)
    if model.compiled:
        want_input_gradient(base.get_input_embeddings())
    skip_gather_in_backward(base.get_input_embeddings(), base.get_output_embeddings())
    for method in ("generate", "logits", "outputs"):
        register_fsdp_forward_method(model, method)
    require_sharded(model, ranks, fsdp.adapters == "replicated")
    return model


def _quantize(base: PreTrainedModel, plan: TrainPlan, shapes: ModelShapes, cache: bool) -> None:
    """Put modules with packed parameters in the place of what is planned to be quantized."""
    swap_linears(base, plan.quantized, cache_dequantized=cache)
    if any(x.stacked for x in plan.quantized):
        use_quantized_experts(base)
    if plan.quantized_edges:
        quantize_edges(base, shapes, QuantFormat.of(plan.quantized_edges[0].layout))


def debug_context(config: RunConfig) -> Callable[[], Any]:
    """Return the context that forward and backward run in."""
    return torch.autograd.detect_anomaly if config.debug.name == "anomaly" else nullcontext
