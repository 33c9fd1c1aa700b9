"""Rules across settings, one small function each; `check` runs them all and reports every failure at once.

A rule yields messages of the form ``key: reason, what to do``. Nothing here needs torch, files or a network.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

from fsdp_qlora.config import choices
from fsdp_qlora.config.adapter_rules import ADAPTER_RULES
from fsdp_qlora.config.answer_rules import ANSWER_RULES, may_hold_out
from fsdp_qlora.config.auto import degree, number
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.convert import known_keys
from fsdp_qlora.config.facts import Range, facts, value_of
from fsdp_qlora.config.objective_rules import OBJECTIVE_RULES
from fsdp_qlora.config.problems import messages
from fsdp_qlora.config.schema import BLOCK_SIZES, RunConfig
from fsdp_qlora.config.track_rules import TRACK_RULES
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.shown import has_password, shown_source

Rule = Callable[[RunConfig], Iterator[str]]


def _range(key: str, allowed: Range, config: RunConfig) -> Iterator[str]:
    value = value_of(config, key)
    if isinstance(value, int | float) and not allowed.holds(value):
        yield f"{key}: {allowed.rule}, got {value}."


_RANGES = tuple(partial(_range, key, fact) for key, fact in facts(RunConfig) if isinstance(fact, Range))


def _finite(group: str, config: RunConfig) -> Iterator[str]:
    for key, value in vars(getattr(config, group)).items():
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                yield f"{group}.{key}: must be a finite number, got {one}."
            elif isinstance(one, int) and not -(2**63) <= one < 2**63:
                yield f"{group}.{key}: {one} is too large; the largest whole number is {2**63 - 1}."


_GROUPS = tuple(f.name for f in dataclasses.fields(RunConfig) if isinstance(f.default_factory, type))
_FINITE = tuple(partial(_finite, group) for group in _GROUPS)


def _optimizer(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if optim.name == "ademamix_8bit" and optim.t_beta3 and not (optim.beta1 > 0 and optim.beta3 > 0):
        yield "optim.t_beta3: beta3 rises from beta1 on a scale of half-lives, so both must be above 0."


def _batches(config: RunConfig) -> Iterator[str]:
    whole = number(config.train.global_batch_size)
    if whole is not None and config.train.micro_batch_size > whole:
        yield (
            f"train.micro_batch_size: {config.train.micro_batch_size} rows do not fit into a global batch of "
            f"{whole}; raise train.global_batch_size or lower train.micro_batch_size."
        )


def _mixture(config: RunConfig) -> Iterator[str]:
    data = config.data
    given = [k for k, v in (("weights", data.weights), ("counts", data.counts), ("temperature", data.temperature)) if v]
    if len(given) > 1:
        yield f"data.{given[0]}: set only one of weights, counts and temperature, not {' and '.join(given)}."


def _shares(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.weights is not None and (min(data.weights, default=0) < 0 or sum(data.weights) <= 0):
        yield f"data.weights: must not be negative or all 0, got {data.weights}."
    if data.counts is not None and (min(data.counts, default=0) < 0 or sum(data.counts) == 0):
        yield f"data.counts: must not be negative or all 0, got {data.counts}."


def _row_function(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.row_function is not None and not data.allow_code:
        yield "data.row_function: runs your own code; set data.allow_code=true to allow it."


def _packing(config: RunConfig) -> Iterator[str]:
    if config.data.packing and config.data.length_grouped:
        yield "data.length_grouped: packed sequences all have the same length; choose packing or length_grouped."


def _layout(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.padding_free and data.packing:
        yield "data.padding_free: packed sequences already have almost no padding; choose packing or padding_free."


def _streaming(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.streaming:
        return
    if config.train.max_steps == 0:
        yield "data.streaming: a stream's length is unknown; set train.max_steps."
    for key, given in {
        "packing": data.packing, "length_grouped": data.length_grouped, "eval_fraction": number(data.eval_fraction),
        "temperature": data.temperature, "counts": data.counts, "max_rows": data.max_rows,
    }.items():  # fmt: skip
        if given:
            yield f"data.{key}: needs all rows before the first step; set data.streaming=false or leave it out."
    if data.weights is not None and len(data.weights) != len(_as_list(data.train)):
        yield f"data.weights: {len(data.weights)} numbers for {len(_as_list(data.train))} sources in data.train."


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _evaluation(config: RunConfig) -> Iterator[str]:
    if number(config.train.eval_every) and not may_hold_out(config.data):
        yield "train.eval_every: there is nothing to evaluate on; set data.eval or data.eval_fraction."


def _patience(config: RunConfig) -> Iterator[str]:
    if config.train.early_stopping_patience > 0 and config.train.eval_every == 0:
        yield "train.early_stopping_patience: needs evaluations during training; set train.eval_every."


def _length(config: RunConfig) -> Iterator[str]:
    if config.train.max_steps == 0 and config.train.num_epochs == 0:
        yield "train.max_steps: nothing to do: max_steps and num_epochs are both 0."


def _names(config: RunConfig) -> Iterator[str]:
    if not re.fullmatch(r"[\w.=,+-]+(/[\w.=,+-]+)*", config.run.name) or {".", ".."} & set(config.run.name.split("/")):
        yield f"run.name: {config.run.name!r} cannot be a folder name; use letters, digits, '.', '_', '-'."


def _sources(config: RunConfig) -> Iterator[str]:
    for key, value in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for source in [value] if isinstance(value, str) else value or ():
            if isinstance(source, str) and has_password(source):
                yield (
                    f"{key}: the URL {shown_source(source)} contains a password, which would be stored with the "
                    "settings. Put it in ~/.netrc or in fsspec's settings (FSSPEC_<PROTOCOL>_<NAME>)."
                )
    if config.data.train is not None and not _is_name_or_names(config.data.train):
        yield "data.train: expected a data source or a list of them."
    if config.data.eval is not None and not _is_name_or_names(config.data.eval):
        yield "data.eval: expected a data source, a list of them, or null."


def _targets(config: RunConfig) -> Iterator[str]:
    if not config.lora.target_modules:
        yield "lora.target_modules: is empty; name linears, or leave it at all-linear."
    elif not _is_name_or_names(config.lora.target_modules):
        yield "lora.target_modules: expected all-linear or a list of module names."
    elif isinstance(config.lora.target_modules, str) and len(names := config.lora.target_modules.split(",")) > 1:
        listed = ",".join(name.strip() for name in names)
        yield f"lora.target_modules: write a list, '[{listed}]', not {config.lora.target_modules!r}."


def _target_parameters(config: RunConfig) -> Iterator[str]:
    if (parameters := config.lora.target_parameters) and not _is_name_or_names(parameters):
        yield "lora.target_parameters: expected experts, or a list of names of stacked weights."
    elif isinstance(parameters, str) and "," in parameters:
        yield f"lora.target_parameters: write a list, '[{parameters}]', not {parameters!r}."
    if parameters and config.lora.dropout:
        yield (
            "lora.dropout: adapters on experts have no dropout, because PEFT cannot store an adapter with dropout on "
            "stacked weights; set lora.dropout=0, or leave lora.target_parameters empty."
        )
    if parameters and config.lora.method not in choices.WITH_EXPERTS and config.lora.method in choices.PEFT_METHODS:
        kinds = " and ".join(choices.WITH_EXPERTS)
        yield f"lora.target_parameters: lora.variant={config.lora.variant} has no adapters for experts; {kinds} have."


def _is_name_or_names(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) and item for item in value)


def _resume(config: RunConfig) -> Iterator[str]:
    known = known_keys(RunConfig)
    for key in config.checkpoint.resume_overrides:
        if key not in known:
            yield f"checkpoint.resume_overrides: there is no setting {key!r}.{nearest(key, known)}"


def _keep_best(config: RunConfig) -> Iterator[str]:
    if config.checkpoint.keep_best and not may_hold_out(config.data):
        yield "checkpoint.keep_best: there is nothing to evaluate on; set data.eval or data.eval_fraction."


def _rollback(config: RunConfig) -> Iterator[str]:
    if config.train.on_nonfinite == "rollback" and config.checkpoint.every_steps == 0:
        yield "train.on_nonfinite: rollback needs checkpoints to roll back to; set checkpoint.every_steps."


def _spikes(config: RunConfig) -> Iterator[str]:
    if 0 < config.train.spike_factor <= 1:
        yield f"train.spike_factor: must be above 1 (or 0 for never), got {config.train.spike_factor}."


def _debug(config: RunConfig) -> Iterator[str]:
    steps, debug = config.train.max_steps, config.debug
    if debug.name == "profile" and 0 < steps <= debug.warmup_steps:
        yield (
            f"debug.warmup_steps: {debug.warmup_steps} leave none of train.max_steps={steps} to record; raise "
            "train.max_steps or lower debug.warmup_steps."
        )


_FAST = {
    "train.compile": ("true",),
    "train.kernels": ("compile", "liger"),
    "model.attn_implementation": ("flash_attention_2", "flex_attention", "blockwise", "varlen"),
    "quant.cache_dequantized": ("true",),
    "fsdp.reshard_after_forward": ("false",),
}
"""Values that ask for a fast path, which ``debug=plain`` turns off."""


def _plain(key: str, fast: Collection[str], config: RunConfig) -> Iterator[str]:
    if config.debug.name == "plain" and (value := value_of(config, key)) in fast:
        yield f"{key}: {value} is a fast path, and debug=plain turns all of them off; leave one of the two out."


_PLAIN = tuple(partial(_plain, key, fast) for key, fast in _FAST.items())


def _quantization(config: RunConfig) -> Iterator[str]:
    quant = config.quant
    if quant.block_size not in BLOCK_SIZES:
        yield f"quant.block_size: must be one of {', '.join(map(str, BLOCK_SIZES))}, got {quant.block_size}."


def _formats(config: RunConfig) -> Iterator[str]:
    quant = config.quant
    kinds = {quant.name, quant.embeddings, quant.vision, *quant.overrides.values()}
    for pattern, kind in quant.overrides.items():
        known = (*choices.FORMATS, choices.NONE)
        if kind not in known:
            yield f"quant.overrides: {pattern}: {kind!r} is not one of {', '.join(known)}.{nearest(kind, known)}"
    if "int8" in kinds and not kinds & {"nf4", "fp4"} and quant.double_quant:
        yield (
            "quant.double_quant: int8 has one statistic per row, which is not quantized again; set it to false (as "
            "quant=int8 does)."
        )
    if quant.cache_dequantized == "true" and not kinds & {"nf4", "fp4"}:
        yield (
            f"quant.cache_dequantized: there is nothing to dequantize in forward with quant={quant.name}; set it to "
            "auto."
        )


def _cached_dense(config: RunConfig) -> Iterator[str]:
    train = config.train
    if config.quant.cache_dequantized == "true" and train.activation_checkpointing in ("selective", "full"):
        yield (
            "quant.cache_dequantized: true keeps dense weights until backward, where activation_checkpointing="
            f"{train.activation_checkpointing} recomputes them; set one of the two to auto."
        )
    if config.quant.cache_dequantized == "true" and config.fsdp.offloads_activations:
        yield (
            f"quant.cache_dequantized: true keeps dense weights until backward, and fsdp.offload={config.fsdp.offload} "
            "would copy them to the host and back, which takes longer than dequantizing them again; set it to auto."
        )


def _compiled(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.compile == "true" and config.fsdp.offloads_activations:
        yield "train.compile: compiled layers hide activations from fsdp.offload; set it to false."
    if train.compile == "true" and config.fsdp.offload_modules:
        yield "train.compile: compiled layers cannot copy in fsdp.offload_modules; set it to false."


def _liger(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.kernels == "liger" and train.compile == "true":
        yield (
            "train.kernels: compiled layers generate such kernels themselves; with train.compile=true, set it to torch "
            "or compile, or set train.compile=false."
        )
    if train.kernels == "liger" and config.launcher.device == "cpu":
        yield "train.kernels: Liger's kernels need a GPU, but launcher.device=cpu; set it to torch or compile."


def _degrees(config: RunConfig) -> Iterator[str]:
    if degree(config.fsdp.shard_degree) is None and config.fsdp.replicate_degree != 1:
        yield (
            f"fsdp.replicate_degree: {config.fsdp.replicate_degree} does not go with fsdp.shard_degree=auto, which "
            "chooses both; set only one of them."
        )


def _replicated(config: RunConfig) -> Iterator[str]:
    if config.fsdp.adapters != "replicated":
        return
    if config.fsdp.offloads_parameters:
        yield (
            f"fsdp.adapters: replicated adapters stay on the device, but fsdp.offload={config.fsdp.offload} keeps "
            "trained parameters in host memory; set adapters=sharded, or offload=none or activations."
        )
    if "none" in (config.quant.name, *config.quant.overrides.values()) and config.precision.name == "bf16":
        yield (
            "fsdp.adapters: replicated adapters are float32, and without quantization they run in PEFT's own layer, "
            "which would also compute in float32; set adapters=sharded, or precision=fp32."
        )


def _plan(config: RunConfig) -> Iterator[str]:
    if config.plan.search and config.plan.gpu is None and config.plan.device is None:
        yield "plan.search: needs a memory size to fit into; set plan.gpu=24GiB or plan.device=rtx4090."
    if config.plan.interconnect is not None and config.plan.device is None:
        yield "plan.interconnect: is compared with a device's compute; also set plan.device."


def _added_tokens(config: RunConfig) -> Iterator[str]:
    tokens, fsdp = config.model.add_tokens, config.fsdp
    if any(not token.strip() for token in tokens):
        yield "model.add_tokens: a token must not be empty or blank."
    if twice := list(dict.fromkeys(token for token in tokens if tokens.count(token) > 1)):
        yield f"model.add_tokens: {', '.join(map(repr, twice))} is named more than once."
    if tokens and (fsdp.offloads_parameters or fsdp.offload_modules):
        key = "offload_modules" if fsdp.offload_modules else f"offload={fsdp.offload}"
        yield f"model.add_tokens: the rows of added tokens stay on the device; leave them or fsdp.{key} out."


RULES: tuple[Rule, ...] = (
    *_FINITE,
    *_RANGES,
    _optimizer,
    _batches,
    _mixture,
    _shares,
    _row_function,
    _packing,
    _layout,
    _streaming,
    _evaluation,
    _patience,
    _length,
    _names,
    _sources,
    _targets,
    _target_parameters,
    _resume,
    _keep_best,
    _rollback,
    _spikes,
    _debug,
    *_PLAIN,
    _quantization,
    _formats,
    _cached_dense,
    _compiled,
    _liger,
    _degrees,
    _replicated,
    *ADAPTER_RULES,
    *TRACK_RULES,
    _plan,
    _added_tokens,
    *ANSWER_RULES,
    *OBJECTIVE_RULES,
)


def failures(config: RunConfig, unknown: Collection[str] = ()) -> list[str]:
    """Return the message of every rule that ``config`` breaks, except those that need an ``unknown`` key."""
    return messages(RULES, config, unknown)


def check(config: RunConfig) -> RunConfig:
    """Return ``config`` if it breaks no rule.

    Raises:
        ConfigError: listing all broken rules, one per line.
    """
    if problems := failures(config):
        raise ConfigError("\n".join(problems))
    return config
