"""`generate`: answers a prompt, token by token, or a file of prompts, with one or several adapters or without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.inference.end_of_turn import end_of_turn
from fsdp_qlora.inference.generate import answer
from fsdp_qlora.run.answers import answer_file
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.world import World


def run(config: RunConfig) -> int:
    """Generate; return the exit code."""
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
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file: {file} cannot be read: {error}.") from error


def _answer_file(config: RunConfig, world: World) -> int:
    config = replace(config, data=replace(config.data, train=None, eval=None))
    prepared = load_for_inference(config, _folders(config), world)
    if config.generate.adapter == BASE:
        prepared.model.use_adapter(BASE)
    count = answer_file(config, prepared)
    if world.ranks.is_main:
        print(f"{count} answers -> {config.generate.to}")
    return 0


def _generate(config: RunConfig, prompt: str, world: World) -> int:
    config = replace(config, data=replace(config.data, train=None, eval=None))
    prepared = load_for_inference(config, _folders(config), world)
    settings, model = config.generate, prepared.model
    end = end_of_turn(prepared.folder, model.base.config, prepared.tokenizer)
    for name in [settings.adapter] if settings.adapter == BASE else prepared.adapters or [None]:
        if name is not None:
            model.use_adapter(name)
        if len(prepared.adapters) > 1 and settings.adapter is None and world.ranks.is_main:
            print(f"{name}:", flush=True)
        torch.manual_seed(config.run.seed)  # so that all ranks sample the same tokens
        answer(
            model, prepared.tokenizer, end, prompt, settings.max_new_tokens, settings.temperature, settings.top_p,
            stream=world.ranks.is_main,
        )  # fmt: skip
    return 0


def _folders(config: RunConfig) -> Path | dict[str, Path] | None:
    """Return the adapters to load: of several, only the one that answers if it is known."""
    if not isinstance(config.adapter, dict):
        return Path(config.adapter).expanduser() if config.adapter else None
    named = {name: Path(folder).expanduser() for name, folder in config.adapter.items()}
    return named.get(config.generate.adapter or "", named)
