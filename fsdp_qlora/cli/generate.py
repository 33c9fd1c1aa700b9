"""`generate`: answers a prompt, token by token, or a file of prompts, with or without an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

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
    adapter = Path(config.adapter).expanduser() if config.adapter else None
    count = answer_file(config, load_for_inference(config, adapter, world))
    if world.ranks.is_main:
        print(f"{count} answers -> {config.generate.to}")
    return 0


def _generate(config: RunConfig, prompt: str, world: World) -> int:
    config = replace(config, data=replace(config.data, train=None, eval=None))
    adapter = Path(config.adapter).expanduser() if config.adapter else None
    prepared = load_for_inference(config, adapter, world)
    torch.manual_seed(config.run.seed)  # so that all ranks sample the same tokens
    settings = config.generate
    end = end_of_turn(prepared.folder, prepared.model.base.config, prepared.tokenizer)
    answer(
        prepared.model, prepared.tokenizer, end, prompt, settings.max_new_tokens, settings.temperature, settings.top_p,
        stream=world.ranks.is_main,
    )  # fmt: skip
    return 0
