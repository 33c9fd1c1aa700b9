"""The story of a run in two calls: `prepare` makes the sharded model real, `fit` trains it (fit.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.adapters.folder import (
    start_from_adapter,
)
from fsdp_qlora.checks.agree import require_losses_agree
from fsdp_qlora.checks.gather import verify_buffers, verify_gather
from fsdp_qlora.checks.twin import Verdict
from fsdp_qlora.config.decided import Choice, as_word
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import ModelSettings, RunConfig
from fsdp_qlora.data.limits import require_rows_fit
from fsdp_qlora.data.prepare import PreparedData, prepare_data
from fsdp_qlora.distributed.nodes import once_per_node
from fsdp_qlora.distributed.reduce import any_rank, on_every
from fsdp_qlora.errors import DataError
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.load.stream import Progress
from fsdp_qlora.model.families import task_type
from fsdp_qlora.model.folder import needs_hub, resolve_folder
from fsdp_qlora.model.tokenizer import build_tokenizer
from fsdp_qlora.plan.choices import Compilation
from fsdp_qlora.run.build import load_model, open_and_check, told
from fsdp_qlora.run.decide import compilation_for, rank_budget
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.world import World, open_world
from fsdp_qlora.shapes.linears import ModelShapes

_EQUAL = "equal to upstream's own code"


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
    opened, verdict = open_and_check(config, folder, ranks, budget)
    tokenizer = on_every(lambda: _tokenizer(config, folder), ranks)
    plan = opened.plan
    data = None
    if config.data.train is not None:
        data = _data_of_node(config, world, tokenizer)
        limit = _longest_row(opened.shapes, verdict)
        on_every(lambda: require_rows_fit(data, config.data, tokenizer, opened.shapes.embedding_rows, limit), ranks)
    world.ranks.phases.enter("loading the model")
    compilation = (
        compilation_for(config, opened.base, plan, data, ranks.device)
        if training
        else Compilation(False, "no training")
    )
    repairs = opened.repairs  # while the model is as transformers built it
    model, report = load_model(opened.compiled(compilation.on), ranks, progress)
    if config.lora.init_from is not None:
        start_from_adapter(Path(config.lora.init_from).expanduser(), config.lora, model, world.ranks)
    world.ranks.phases.enter("comparing what the ranks gather")
    verify_gather(model, world.ranks)
    verify_buffers(model, world.ranks)
    if training and config.model.check != "off" and task_type(model.base) == "CAUSAL_LM":
        require_losses_agree(model, world.ranks)
    return Prepared(
        config, plan, model, tokenizer, world.ranks, folder, opened.shapes, report, data, world.threads,
        {**plan.choices, "model.attn_implementation": told(verdict),
         "model.check": Choice("off: nothing was compared" if config.model.check == "off" else _EQUAL, ""),
         "train.compile": Choice(as_word(compilation.on), compilation.why)},
        repairs, world.stack,
    )  # fmt: skip


def _data_of_node(config: RunConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Return the tokenized data; one process of each node makes them, the others wait in no collective."""
    phases = world.ranks.phases
    phases.enter("preparing the data")
    return prepare_data(
        config.data, config.run.seed, tokenizer, cache_folder(), partial(_share, world), lambda _: phases.sign(),
        phases.by_itself,
    )  # fmt: skip


def _longest_row(shapes: ModelShapes, verdict: Verdict) -> int | None:
    """Return how many positions rows can have; None where there is no end to them."""
    unusable = verdict.unusable_positions
    return shapes.max_positions - unusable if unusable is not None and shapes.max_positions else None


def _find_model(model: ModelSettings, world: World) -> Path:
    """Return the base model's folder; one process of each node downloads it where it is on the hub."""
    ranks = world.ranks
    if not any_rank(needs_hub(model.name), ranks):
        return on_every(lambda: resolve_folder(model.name, model.revision), ranks)

    def download() -> str:
        return str(resolve_folder(model.name, model.revision))

    return Path(_share(world, download, model.name))


def _share(world: World, work: Callable[[], str], doing: str = "preparing the data") -> str:
    """Do something in one process of each node; every rank returns what its node's process returned."""

    def say(line: str) -> None:
        if world.ranks.is_main:
            print(f"{doing}: {line}", flush=True)

    return once_per_node(work, world.ranks, world.placement.local_rank, say)


def prepare_tokens(config: RunConfig, progress: Callable[[int], None] | None = None) -> PreparedData:
    """Tokenize the data alone: no model, no process group. ``progress`` takes the rows read so far."""
    check(config)
    tokenizer = _tokenizer(config, resolve_folder(config.model.name, config.model.revision))
    return prepare_data(config.data, config.run.seed, tokenizer, cache_folder(), progress=progress)


def _tokenizer(config: RunConfig, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer(folder, config.model.trust_remote_code)
    if config.data.template is not None:
        try:
            tokenizer.chat_template = Path(config.data.template).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"data.template: {config.data.template} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"data.template: {config.data.template} is not valid UTF-8.") from error
    return tokenizer


def debug_context(config: RunConfig) -> Callable[[], Any]:
    """Return the context that forward and backward run in."""
    return torch.autograd.detect_anomaly if config.debug.name == "anomaly" else nullcontext
