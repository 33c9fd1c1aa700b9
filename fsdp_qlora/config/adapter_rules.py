"""Rules on adapters: what a method and a start from the base weights cannot do, and what several need."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from fsdp_qlora.config import choices
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.schema import LoraSettings, RunConfig


def _method(config: RunConfig) -> Iterator[str]:
    """Refuse what an adapter method cannot do; one that is registered later refuses by itself."""
    lora = config.lora
    known = choices.PEFT_METHODS.get(lora.variant, ())
    for option in lora.options:
        if option not in known:
            there = f"its options are {', '.join(known)}" if known else "it has no options"
            yield f"lora.options: {lora.variant} has no {option!r}; {there}.{nearest(option, known)}"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(lora, key)
        if patterns and lora.method not in choices.WITH_PATTERNS:
            kinds = ", ".join(choices.WITH_PATTERNS)
            yield f"lora.{key}: {lora.variant} has one rank and alpha for all modules; {kinds} have not."
        if bad := [pattern for pattern, value in patterns.items() if not value > 0]:
            yield f"lora.{key}: {bad[0]}={patterns[bad[0]]} must be above 0."
    if any(number < 0 for number in lora.layers_to_transform):
        yield "lora.layers_to_transform: layers are numbered from 0."
    if lora.method not in choices.PEFT_METHODS:
        return
    if lora.dropout and lora.method not in choices.WITH_DROPOUT:
        yield f"lora.dropout: {lora.variant} does not drop its input; set it to 0."
    if config.train.compile == "true":
        yield f"train.compile: PEFT's layers for lora.variant={lora.method} are not compiled; set it to auto or false."
    if config.fsdp.adapters == "replicated" and config.precision.name == "bf16":
        yield (
            f"fsdp.adapters: replicated adapters are float32, and PEFT's layers for lora.variant={lora.method} would "
            "also compute in float32; set adapters=sharded, or precision=fp32."
        )


def _bundle(config: RunConfig) -> Iterator[str]:
    """Refuse switches that contradict the variant, or that it does not have."""
    lora = config.lora
    switches: dict[str, Any] = {
        key: getattr(lora, key)
        for key in ("use_rslora", "use_dora", "init_lora_weights")
        if getattr(lora, key) is not None
    }
    for key, value in switches.items():
        word = str(value).lower()
        if lora.variant not in choices.BUNDLES:
            yield f"lora.{key}: {lora.variant} has no such switch, only LoRA's kinds do; leave it out."
        elif str(choices.BUNDLES[lora.variant].get(key, value)).lower() != word and not _refines(lora.variant, word):
            yield (
                f"lora.{key}: {word} contradicts lora.variant={lora.variant}, which means "
                f"{key}={str(choices.BUNDLES[lora.variant][key]).lower()}; leave one of them out."
            )
    if not lora.start_is_known:
        words = ("true", "pissa", "pissa_niter_4", "olora", "loftq", "eva")
        yield (
            f"lora.init_lora_weights: {lora.init_lora_weights!r} is not one of true, pissa, pissa_niter_N (N above 0), "
            f"olora, loftq, eva.{nearest(str(lora.init_lora_weights), words)}"
        )


def _refines(variant: str, word: str) -> bool:
    """Whether ``init_lora_weights`` says the variant's own start more exactly."""
    return variant == "pissa" and word.startswith("pissa_niter_")


def _start(config: RunConfig) -> Iterator[str]:
    """Refuse a start from the base weights where there is nothing to start from."""
    lora = config.lora
    if lora.loftq_iter != 1 and lora.start != "loftq":
        yield "lora.loftq_iter: counts the alternations of LoftQ; set lora.init_lora_weights=loftq or leave it out."
    yield from _eva(lora)
    if lora.start is None:
        return
    if lora.start == "loftq" and config.quant.name == "none" and not config.quant.overrides:
        yield (
            "lora.init_lora_weights: loftq starts from what quantization loses, and quant=none loses nothing; choose "
            "pissa or olora, or quantize the base."
        )
    if lora.target_parameters:
        yield (
            f"lora.target_parameters: adapters on stacked experts do not start from the base weights, as "
            f"lora.init_lora_weights={lora.start} does; leave one of them out."
        )
    if lora.init_from is not None:
        yield (
            f"lora.init_from: an adapter that is there already does not start from the base weights, as "
            f"lora.init_lora_weights={lora.start} does; leave one of them out."
        )


def _eva(lora: LoraSettings) -> Iterator[str]:
    """Refuse what EVA cannot do, and its settings without it."""
    if not lora.starts_from_rows:
        unset = LoraSettings()
        for key in ("eva_rho", "eva_tau", "eva_whiten", "eva_adjust_scaling_factors"):
            if getattr(lora, key) != getattr(unset, key):
                yield f"lora.{key}: is a setting of EVA; set lora.init_lora_weights=eva or leave it out."
        return
    if lora.eva_rho < 1:
        yield f"lora.eva_rho: must be at least 1, got {lora.eva_rho}."
    if lora.target_parameters:
        yield (
            "lora.target_parameters: adapters on stacked experts do not start from training rows, as "
            "lora.init_lora_weights=eva does; leave one of them out."
        )
    if lora.init_from is not None:
        yield (
            "lora.init_from: an adapter that is there already does not start from training rows, as "
            "lora.init_lora_weights=eva does; leave one of them out."
        )


def _adapters(config: RunConfig) -> Iterator[str]:
    chosen, names = config.generate.adapter, config.adapter
    if not isinstance(names, dict):
        if chosen is not None:
            yield "generate.adapter: chooses among several adapters; set adapter={name: FOLDER, ...}."
        return
    if not names:
        yield "adapter: names no adapter; give {name: FOLDER, ...}, one folder, or null."
    for name in names:
        if not re.fullmatch(r"[^\W_][\w-]*", name):
            yield f"adapter: {name!r} cannot name an adapter; use letters, digits, '_' and '-'."
    known = [*names, "__base__"]
    if chosen is not None and chosen not in known:
        yield f"generate.adapter: {chosen!r} is not one of {', '.join(known)}.{nearest(chosen, known)}"


def combination_needs(config: RunConfig) -> Iterator[str]:
    """Yield what keeps `export` from making one adapter of several."""
    names, export = config.adapter, config.export
    if not isinstance(names, dict):
        if export.weights:
            yield "export.weights: weigh several adapters; set adapter={name: FOLDER, ...}."
        return
    if config.what != "adapter" or export.plain_lora or export.for_vllm:
        yield "adapter: several become one with what=adapter, and nothing else takes them; give one folder."
    if names.keys() != export.weights.keys():
        there = ", ".join(export.weights) or "none"
        yield f"export.weights: needs one for each of {', '.join(names)}, got {there}."
    if not all(math.isfinite(weight) for weight in export.weights.values()):
        yield f"export.weights: must be finite numbers, got {export.weights}."
    if not export.to:
        yield "export.to: not set. Give the folder for the combined adapter."
    if export.checkpoint:
        yield "export.checkpoint: holds one adapter; leave it out, or name its adapter/ folder in adapter={...}."
    if export.rank and export.combination != "svd":
        yield f"export.rank: export.combination={export.combination} has no choice of ranks; leave it out, or take svd."


def _full(config: RunConfig) -> Iterator[str]:
    """Refuse what does not go with training the whole base."""
    if not config.lora.trains_base:
        return
    quant, fsdp = config.quant, config.fsdp
    for key, value in {
        "quant": quant.name, "quant.embeddings": quant.embeddings, "quant.vision": quant.vision, **quant.overrides,
    }.items():  # fmt: skip
        if value != choices.NONE:
            yield f"lora: none trains the base itself, which {key}={value} quantizes; set it to none."
    for key, given in {
        "model.add_tokens": config.model.add_tokens, "lora.init_from": config.lora.init_from,
        "lora.target_parameters": config.lora.target_parameters, "lora.modules_to_save": config.lora.modules_to_save,
        f"lora.bias={config.lora.bias}": config.lora.bias != choices.NONE,
        "optim.loraplus_lr_ratio": config.optim.loraplus_lr_ratio,
        "fsdp.offload_modules": fsdp.offload_modules, f"fsdp.offload={fsdp.offload}": fsdp.offloads_parameters,
        f"fsdp.adapters={fsdp.adapters}": fsdp.adapters != "sharded",
    }.items():  # fmt: skip
        if given:
            yield f"{key}: does not go with lora=none, which trains the whole base; leave it out."


def _beside_adapters(config: RunConfig) -> Iterator[str]:
    """Refuse what does not go with weights of the base that are trained beside adapters."""
    lora, fsdp = config.lora, config.fsdp
    if lora.bias != choices.NONE and not lora.trains_base and lora.method not in choices.WITH_PATTERNS:
        kinds = ", ".join(choices.WITH_PATTERNS)
        yield f"lora.bias: only with {kinds}, not with lora.variant={lora.variant}; set it to none."
    if any(not name.strip() for name in lora.modules_to_save):
        yield "lora.modules_to_save: a name must not be empty."
    if lora.trains_base or not lora.trains_masters:
        return
    key = "lora.modules_to_save" if lora.modules_to_save else f"lora.bias={lora.bias}"
    for other, given in {
        "fsdp.offload_modules": fsdp.offload_modules, f"fsdp.offload={fsdp.offload}": fsdp.offloads_parameters,
        "fsdp.adapters=replicated": fsdp.adapters == "replicated" and config.precision.name == "bf16",
    }.items():  # fmt: skip
        if given:
            yield f"{other}: does not go with {key}, whose float32 weights are sharded; leave one of them out."


ADAPTER_RULES = (_method, _bundle, _start, _adapters, _full, _beside_adapters)
