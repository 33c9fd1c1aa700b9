"""Rules on what `generate` asks and what `evaluate` measures. See `fsdp_qlora.config.rules`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fsdp_qlora.config.auto import number
from fsdp_qlora.config.schema import DataSettings, RunConfig


def _prompts(config: RunConfig) -> Iterator[str]:
    given = [key for key in ("prompt", "prompt_file") if getattr(config, key) is not None]
    if len(given) == 2:
        yield "prompt_file: give prompt or prompt_file, not both."
    if config.generate.prompts is not None:
        if given:
            yield "generate.prompts: give one prompt or a file of prompts, not both."
        if config.generate.to is None:
            yield "generate.to: not set. Give the file for the answers to generate.prompts."


def _chat(config: RunConfig) -> Iterator[str]:
    given = [key for key in ("prompt", "prompt_file") if getattr(config, key) is not None]
    if config.generate.chat and (given or config.generate.prompts is not None):
        key = given[0] if given else "generate.prompts"
        yield f"generate.chat: reads what you say from standard input; leave {key} out, or generate.chat."


def _stops(config: RunConfig) -> Iterator[str]:
    if not all(config.generate.stop):
        yield "generate.stop: an empty text would end every answer; leave it out."


def _device_map(config: RunConfig) -> Iterator[str]:
    generate, quant = config.generate, config.quant
    if generate.device_map is None:
        for key in ("max_memory", "offload_fp32", "offload_folder"):
            if getattr(generate, key):
                yield f"generate.{key}: is about generate.device_map; set that as well, or leave it out."
        return
    if config.launcher.nproc_per_node > 1:
        yield "generate.device_map: one process drives all devices; leave out launcher.nproc_per_node."
    if generate.offload_fp32 and quant.name == "none":
        yield "generate.offload_fp32: is about quantized layers, and quant=none has none; leave it out."
    own = {
        "quant.overrides": quant.overrides, "quant.embeddings": quant.embeddings != "none",
        "quant.vision": quant.vision != "none", "quant.block_size": quant.block_size != 64,
        "model.config_overrides": config.model.config_overrides, "model.add_tokens": config.model.add_tokens,
    }  # fmt: skip
    for key in (key for key, given in own.items() if given):
        yield f"{key}: plain transformers has no such thing; leave it out, or generate.device_map."
    for device, size in generate.max_memory.items():
        if not device.isdigit() and device not in ("cpu", "mps"):
            yield f"generate.max_memory: {device!r} is no device; name the number of one, or cpu."
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", size, re.IGNORECASE):
            yield f"generate.max_memory: {size!r} is not an amount of memory; write it as 24GiB or 80GB."


def _tasks(config: RunConfig) -> Iterator[str]:
    evaluate = config.evaluate
    if not evaluate.tasks:
        for key in ("task_path", "limit", "num_fewshot", "chat_template"):
            if getattr(evaluate, key):
                yield f"evaluate.{key}: is about tasks; set evaluate.tasks as well, or leave it out."


def _named_twice(config: RunConfig) -> Iterator[str]:
    evaluate = config.evaluate
    if twice := sorted({task for task in evaluate.tasks if evaluate.tasks.count(task) > 1}):
        yield f"evaluate.tasks: {', '.join(twice)} is named more than once."


ANSWER_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _prompts, _chat, _stops, _device_map, _tasks, _named_twice,
)  # fmt: skip


def has_rows(config: RunConfig) -> bool:
    """Whether the settings name held-out rows."""
    return may_hold_out(config.data) and bool(config.data.eval or config.data.train)


def may_hold_out(data: DataSettings) -> bool:
    """Whether there may be held-out rows: they are named, or taken off the training rows if there are enough."""
    return data.eval is not None or (not data.streaming and number(data.eval_fraction) != 0)
