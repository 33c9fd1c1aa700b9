"""The first half of a run: `prepare` builds and loads the sharded model, which `run/fit.py` trains."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fsdp_qlora.adapters.eva_start import fill_directions
from fsdp_qlora.adapters.served import ServedAdapter, adapter_size
from fsdp_qlora.adapters.turns import Starts
from fsdp_qlora.checks.gather import verify_buffers, verify_gather
from fsdp_qlora.config.auto import Choice, as_word
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import ModelSettings, RunConfig
from fsdp_qlora.data.prepare import PreparedData, held_out_choice
from fsdp_qlora.distributed.memory import resident_bytes, return_freed_memory
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import any_rank, on_every
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stream import Progress
from fsdp_qlora.model.families import task_type
from fsdp_qlora.model.folder import needs_hub, resolve_folder
from fsdp_qlora.model.kernels import kernels_to_compile
from fsdp_qlora.plan.choices import KERNELS_KEY
from fsdp_qlora.plan.recipe import Recipe, choose_recipe
from fsdp_qlora.run.build import OpenedModel, Weights, load_model, open_model, require_adapter
from fsdp_qlora.run.check import check_losses, open_and_check, told
from fsdp_qlora.run.decide import (
    SHARD_DEGREE,
    compilation_for,
    on_device,
    rank_budget,
    replace_attention,
    rows_of,
    settled_world,
    shape_of,
)
from fsdp_qlora.run.eva import settle
from fsdp_qlora.run.images import images_choice, images_of_rows, settled_on_ranks
from fsdp_qlora.run.labels import require_metrics, settle_labels
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.starts import kept_start
from fsdp_qlora.run.tokens import first_added, tokenize
from fsdp_qlora.run.world import World, open_world
from fsdp_qlora.track.bars import Bar

_log = logging.getLogger(__name__)
_EQUAL = "equal to upstream's own code"


def prepare(
    config: RunConfig,
    world: World | None = None,
    progress: Progress | None = None,
    training: bool = True,
    weights: Weights = SafetensorsFolder,
    start: Path | None = None,
    served: Sequence[ServedAdapter] = (),
    bare: bool = False,
    adapter: Path | None = None,
) -> Prepared:
    """Build, quantize, adapt, shard and load the model; tokenize the data if any is given.

    Call it on every rank under torchrun, or in a single process. Close the result when you are done with it. With
    ``training=False``, steps that only serve training are skipped (compiled layers, the loss comparison). ``weights``
    opens the weights of the base model's folder (a benchmark draws them instead of reading them). ``start`` is the file
    of what an adapter started from, if that was the base weights; None: a run's own, or it is computed. ``served`` are
    the adapters of `load_for_inference`, and ``adapter`` is its only one: they are checked before weights are read.
    ``bare`` adds none at all.
    """
    check(config)
    if world is not None:
        return _prepare(config, world, progress, training, weights, start, served, bare, adapter)
    world = open_world(config)
    try:
        return _prepare(config, world, progress, training, weights, start, served, bare, adapter)
    except BaseException:
        world.stack.__exit__(*sys.exc_info())  # or the next call would find a process group open
        raise


def _prepare(
    config: RunConfig, world: World, progress: Progress | None, training: bool, weights: Weights, start: Path | None,
    served: Sequence[ServedAdapter], bare: bool, adapter: Path | None,
) -> Prepared:  # fmt: skip
    on_every(lambda: require_metrics(config), world.ranks)
    asked, folder = config, _find_model(config.model, world)
    config = settle_labels(settled_on_ranks(config, folder, training, world.ranks), folder, world.ranks, adapter)
    budget = rank_budget(world.ranks, world.placement)
    config, world, layout = settled_world(on_device(config, world.ranks.device.type), folder, world, budget)
    _say(kernels_to_compile(config.train.kernels, world.ranks.device), world.ranks)
    opened, verdict = open_and_check(config, folder, world.ranks, budget, weights)
    opened = opened.without_adapters(world.ranks, budget) if bare else opened
    processor, data = tokenize(config, folder, opened, verdict, world)
    opened = replace(opened, shapes=images_of_rows(opened.shapes, data))
    recipe = on_every(lambda: _recipe(config, opened, data, training), world.ranks)
    config = replace_attention(recipe.settled(config), verdict.attention)
    opened = opened if bare else opened.for_run(config, world.ranks, budget)
    opened = opened if training else opened.to_answer()
    first, starts = on_every(lambda: first_added(config, opened.shapes, processor), world.ranks), Starts()
    if training and config.lora.starts_from_rows:
        lora, starts = settle(replace(opened, first_added=first), folder, data, world.ranks, config)
        config = replace(config, lora=lora)
        opened = on_every(lambda: open_model(config, folder, world.ranks, budget, False, weights), world.ranks)
        gc.collect()  # the base that was searched: a sharded model is full of cycles
    compilation = compilation_for(config, opened.base, opened.plan, data, world.ranks.device, training, recipe)
    repairs = opened.repairs  # needs the model as transformers built it, before load_model changes it
    world.ranks.phases.enter("loading the model")
    opened = replace(opened.compiled(compilation.on), first_added=first)
    for one in (*([] if adapter is None else [adapter]), *(each.folder for each in served)):
        require_adapter(one, opened, world.ranks)
    return_freed_memory()
    process_bytes = resident_bytes()
    if training and opened.config.lora.start is not None:
        start = start or kept_start(opened, folder, world.ranks)
    bar = progress or (Bar("loading and quantizing") if world.ranks.is_main else None)
    model, report = load_model(opened, world.ranks, bar, start, served)
    if starts.digest:
        model.starts = starts
        fill_directions(model, starts, world.ranks)
    world.ranks.phases.enter("comparing what the ranks gather")
    verify_gather(model, world.ranks)
    verify_buffers(model, world.ranks)
    if training and config.model.check != "off" and task_type(model.base) == "CAUSAL_LM":
        check_losses(opened, model, folder, world.ranks)
    kernels, layouts = opened.plan.choices[KERNELS_KEY], {} if layout is None else {SHARD_DEGREE: layout}
    choices = images_choice(opened.config, opened.base.config.model_type, opened.shapes) | recipe.choices
    choices |= held_out_choice(config.data, data) | layouts | opened.plan.choices | {
        "model.attn_implementation": told(verdict),
        "model.check": Choice("off: nothing was compared" if config.model.check == "off" else _EQUAL, ""),
        "train.compile": Choice(as_word(compilation.on), compilation.why),
        KERNELS_KEY: replace(kernels, why=kernels.why + model.fused),
    }  # fmt: skip
    return Prepared(
        config=asked, settings=opened.config, plan=opened.plan, model=model, processor=processor, ranks=world.ranks,
        folder=folder, shapes=opened.shapes, load=report, data=data, placement=world.placement, threads=world.threads,
        adapters={adapter.name: adapter_size(model, adapter.name) for adapter in served},
        origin=opened.origin, process_bytes=process_bytes, choices=choices, repairs=repairs, recipe=recipe,
        _stack=world.stack,
    )  # fmt: skip


def _say(line: str | None, ranks: Ranks) -> None:
    if line and ranks.is_main:
        _log.info("%s", line)


def _recipe(config: RunConfig, opened: OpenedModel, data: PreparedData | None, training: bool) -> Recipe:
    """Choose the numbers of the run; without training, nothing asks how many rows there are."""
    rows = rows_of(config.data, data) if training else None
    return choose_recipe(config, shape_of(opened.base, opened.shapes), rows)


def _find_model(model: ModelSettings, world: World) -> Path:
    """Return the base model's folder; a hub model is downloaded by one process per node."""
    if not any_rank(needs_hub(model.name), world.ranks):
        return on_every(lambda: resolve_folder(model.name, model.revision), world.ranks)
    return Path(world.share(lambda: str(resolve_folder(model.name, model.revision)), model.name))
