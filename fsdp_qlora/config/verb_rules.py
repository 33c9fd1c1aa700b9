"""What each verb needs beyond valid settings, one small function each, as in `fsdp_qlora.config.rules`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from fsdp_qlora.config.adapter_rules import combination_needs
from fsdp_qlora.config.answer_rules import has_rows
from fsdp_qlora.config.choices import OF_IMAGES
from fsdp_qlora.config.gguf_rules import gguf_needs
from fsdp_qlora.config.problems import messages
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.config.track_rules import trackers_needs
from fsdp_qlora.errors import ConfigError


def _model(config: RunConfig) -> Iterator[str]:
    if not config.model.name and not config.adapter:
        yield "model.name: not set. Give a hub name (Qwen/Qwen3-8B), a folder, or experiment=quickstart."


def _answering_model(config: RunConfig) -> Iterator[str]:
    if not config.model.name and not config.adapter:
        yield "model.name: not set. Give a model, or adapter=FOLDER, which names its base."


def _data(config: RunConfig) -> Iterator[str]:
    if config.data.train is None:
        yield "data.train: not set. Give a file, a folder, a hub data set, or a list of them."


def _one_adapter(config: RunConfig) -> Iterator[str]:
    if isinstance(config.adapter, dict):
        yield "adapter: evaluate measures one adapter; give its folder."


def _with_its_base(config: RunConfig) -> Iterator[str]:
    if config.evaluate.compare and not config.adapter:
        yield "evaluate.compare: compares an adapter with its base; set adapter=FOLDER, or leave it out."


def _measured(config: RunConfig) -> Iterator[str]:
    if not has_rows(config) and not config.evaluate.tasks and config.evaluate.prompts is None:
        yield (
            "data.eval: there is nothing to evaluate on; set it, or data.train with data.eval_fraction, or "
            "evaluate.tasks or evaluate.prompts."
        )


def _prompt(config: RunConfig) -> Iterator[str]:
    asked = (config.prompt, config.prompt_file, config.generate.prompts)
    if all(each is None for each in asked) and not config.generate.chat:
        yield (
            'prompt: not set. Give prompt="..." or prompt_file=FILE, or generate.prompts=FILE.jsonl, or '
            "generate.chat=true."
        )


def _writes(config: RunConfig) -> Iterator[str]:
    if config.objective.name in OF_IMAGES:
        yield f"objective: a model of objective={config.objective.name} reads images and writes no texts; use evaluate."


def _of_texts(config: RunConfig) -> Iterator[str]:
    if config.objective.name in OF_IMAGES and (config.what != "adapter" or config.export.compare):
        key = f"what={config.what}" if config.what != "adapter" else "export.compare"
        yield (
            f"{key.partition('=')[0]}: {key} is for language models; the adapter of objective={config.objective.name} "
            "loads in plain PEFT, whose merge_and_unload makes one model of both."
        )


def _base_4bit(config: RunConfig) -> Iterator[str]:
    if config.what != "base-4bit":
        return
    if not config.model.name and not config.adapter:
        yield "model.name: not set. what=base-4bit stores this model in 4 bits."
    if not config.export.to:
        yield "export.to: not set. Give the folder that what=base-4bit writes."
    if config.quant.name not in ("nf4", "fp4") or config.quant.overrides:
        yield "quant: what=base-4bit stores all linears in one 4-bit format; choose nf4 or fp4, without overrides."
    if config.export.checkpoint:
        yield "export.checkpoint: holds an adapter; leave it out, or set what=adapter."
    if config.export.plain_lora:
        yield "export.plain_lora: converts an adapter; set what=adapter."


def _converted(config: RunConfig) -> Iterator[str]:
    if config.export.plain_lora and not config.export.to:
        yield "export.to: not set. Give the folder that export.plain_lora=true writes."
    if config.what == "adapter" and isinstance(config.adapter, str) and not config.export.to:
        yield "export.to: not set. Give the folder for a copy of the adapter."


def _model_of_both(config: RunConfig) -> Iterator[str]:
    """Yield what keeps `export` from making a model of a base and an adapter."""
    what = config.what
    if what not in ("merged", "served"):
        return
    if not config.export.to:
        yield f"export.to: not set. Give the folder that what={what} writes."
    if config.adapter and config.export.checkpoint:
        yield "export.checkpoint: adapter names the adapter to export; give one of them."
    for key in ("for_vllm", "plain_lora"):
        if getattr(config.export, key):
            yield f"export.{key}: converts an adapter, and what={what} writes a model; leave it out."


def _served(config: RunConfig) -> Iterator[str]:
    if config.what == "served" and (config.quant.name not in ("nf4", "fp4") or config.quant.overrides):
        yield (
            "quant: what=served stores all linears in one 4-bit format; choose nf4 or fp4, without overrides, or "
            "what=merged."
        )


def _push(config: RunConfig) -> Iterator[str]:
    if config.export.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.export.push):
        yield f"export.push: {config.export.push!r} is no repository of the hub; name OWNER/NAME."


def _compared(config: RunConfig) -> Iterator[str]:
    if config.export.compare and (config.what not in ("merged", "adapter") or config.export.plain_lora):
        yield "export.compare: compares an adapter or a merge with the trained model; set what=merged or what=adapter."


NEEDS: dict[str, tuple[Callable[[RunConfig], Iterator[str]], ...]] = {
    "train": (_model, _data, trackers_needs),
    "plan": (_model,),
    "prepare": (_model,),
    "evaluate": (_model, _one_adapter, _with_its_base, _measured),
    "export": (
        _of_texts,
        combination_needs,
        _base_4bit,
        _converted,
        _model_of_both,
        _served,
        _push,
        _compared,
        gguf_needs,
    ),
    "generate": (_prompt, _writes, _answering_model),
}


def missing(verb: str, config: RunConfig, unknown: Collection[str] = ()) -> list[str]:
    """Return what ``verb`` lacks, leaving out whatever depends on one of the ``unknown`` keys."""
    return messages(NEEDS.get(verb, ()), config, unknown)


def check_verb(verb: str, config: RunConfig) -> RunConfig:
    """Return ``config`` if it has everything that ``verb`` needs.

    Raises:
        ConfigError: naming everything that is missing.
    """
    if problems := missing(verb, config):
        raise ConfigError("\n".join(problems))
    return config
