"""`generate`: answers a prompt, token by token, or a file of prompts, or talks; with adapters or without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.cli.typed import is_terminal, typed_lines
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.inference.generate import answer_ids
from fsdp_qlora.run.answers import Answering, answer_file, check_files, ending, prompt_ids, sampling_seed
from fsdp_qlora.run.chat import Talk
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.spread import load_over_devices
from fsdp_qlora.run.world import World


def run(config: RunConfig) -> int:
    """Generate; return the exit code."""
    if config.generate.chat:
        return on_ranks(config, lambda world: _chat(config, world))
    if config.generate.prompts is not None:
        return on_ranks(config, lambda world: _answer_file(config, world))
    prompt = config.prompt if config.prompt is not None else _read(config.prompt_file or "")
    if not prompt.strip():
        raise ConfigError(
            "prompt: is empty." if config.prompt is not None else f"prompt_file: {config.prompt_file} is empty."
        )
    return on_ranks(config, lambda world: _generate(config, prompt, world))


def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file: {file} cannot be read: {error}.") from error


def _load(config: RunConfig, world: World, whole: bool) -> Answering:
    """Load the model and its adapters without data: of several adapters, ``whole`` loads all."""
    config = replace(config, data=replace(config.data, train=None, eval=None))
    load = load_for_inference if config.generate.device_map is None else load_over_devices
    folders = config.adapter
    if not isinstance(folders, dict):
        return load(config, Path(folders).expanduser() if folders else None, world)
    named = {name: Path(folder).expanduser() for name, folder in folders.items()}
    chosen = None if whole else named.get(config.generate.adapter or "")
    return load(config, named if chosen is None else chosen, world)


def _chat(config: RunConfig, world: World) -> int:
    prepared = _load(config, world, whole=True)
    Talk(config, prepared).run(typed_lines(), introduce=is_terminal())
    return 0


def _answer_file(config: RunConfig, world: World) -> int:
    check_files(config, world.ranks)
    count = answer_file(config, _load(config, world, whole=True))
    if world.ranks.is_main:
        print(f"{count} answers -> {config.generate.to}")
    return 0


def _generate(config: RunConfig, prompt: str, world: World) -> int:
    prepared = _load(config, world, whole=False)
    settings, model = config.generate, prepared.model
    ids = prompt_ids(prepared, prompt, settings)
    for name in [settings.adapter] if settings.adapter == BASE else prepared.adapters or [None]:
        if name is not None:
            model.use_adapter(name)
        if len(prepared.adapters) > 1 and settings.adapter is None and world.ranks.is_main:
            print(f"{name}:", flush=True)
        torch.manual_seed(sampling_seed(config))  # so that all ranks sample the same tokens
        answer_ids(model, prepared.tokenizer, ending(prepared, settings), ids, settings, stream=world.ranks.is_main)
    return 0
