"""Derives the twin's settings from the run's: the same code paths, with small sizes and nothing random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fsdp_qlora.adapters import build_method
from fsdp_qlora.attention.flatten import reads_boundaries
from fsdp_qlora.config.choices import NONE
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.shapes.patterns import numbered
from fsdp_qlora.shapes.targets import ALL_EXPERTS

LENGTHS = (64, 41)
"""Lengths of the twin's rows: longer than its windows and chunks, and uneven, so that one is padded."""
NO_DROPOUT = 1e-9
"""Dropout rate that takes the code path of dropout but drops nothing."""


def _comparable(name: str) -> str:
    """Return a format whose forward is comparable with upstream's; int8 is not, as it also rounds activations."""
    if name == NONE or build_format(name).dense_forward:
        return name
    return "nf4"  # int8 itself is tested elsewhere (tests/distributed/test_formats.py)


T = TypeVar("T")


def _unnumbered(patterns: Mapping[str, Any], value: T) -> dict[str, T]:
    """Return ``value`` for the patterns without a number: the twin may lack a numbered layer."""
    return {pattern: value for pattern in patterns if not numbered(pattern)}


def _small_adapters(lora: LoraSettings) -> LoraSettings:
    """Return the twin's adapters: of the run's method, on the same kinds of linears, where some have another rank."""
    targets, parameters, r = lora.target_modules, lora.target_parameters, min(4, lora.r)
    if isinstance(targets, list | tuple) and any("." in name for name in targets):
        targets = "all-linear"  # full names of layers, which the twin may lack
    if isinstance(parameters, list | tuple) and any(map(numbered, parameters)):
        parameters = ALL_EXPERTS
    alpha = lora.alpha * r / lora.r  # with the run's scaling: a larger one would only magnify rounding
    return replace(
        lora, variant=lora.method, init_lora_weights=None,  # any values will do
        r=r, alpha=alpha, dropout=NO_DROPOUT if lora.dropout else 0.0, init_from=None, target_modules=targets,
        target_parameters=parameters,
        exclude_modules=[name for name in lora.exclude_modules if not numbered(name)], layers_to_transform=[],
        rank_pattern=_unnumbered(lora.rank_pattern, max(1, r - 1)),
        alpha_pattern=_unnumbered(lora.alpha_pattern, 2 * alpha),
        modules_to_save=[], bias="none",  # trained as the whole base is: the twin compares the layers with adapters
        options={**lora.options, **build_method(lora.method).small},
    )  # fmt: skip


def twin_settings(config: RunConfig, folder: Path, attention: str, device: torch.device) -> RunConfig:
    """Return the settings for the run's twin: the same code paths, small sizes, nothing random."""
    precision = "bf16" if reads_boundaries(attention) and device.type != "cpu" else "fp32"
    kinds = {key: _comparable(getattr(config.quant, key)) for key in ("name", "embeddings", "vision")}
    quant = replace(config.quant, **kinds)
    overrides = {  # without those for numbered layers, which the twin may lack or number differently
        pattern: _comparable(kind) for pattern, kind in quant.overrides.items() if not numbered(pattern)
    }
    data = replace(config.data, train=None, eval=None, max_length=LENGTHS[0])
    sequences = 1 if config.train.micro_batch_size == 1 and not config.train.micro_batch_tokens else 2
    return replace(
        config,
        model=replace(
            config.model, name=str(folder), revision=None, attn_implementation=attention, config_overrides={}
        ),
        data=data,
        quant=replace(quant, allow_16bit=True, overrides=overrides, block_size=min(64, quant.block_size)),
        lora=_small_adapters(config.lora),
        precision=replace(config.precision, name=precision),
        train=replace(
            config.train, micro_batch_size=sequences, micro_batch_tokens=0, logits_chunk=16, compile="false"
        ),
        fsdp=replace(config.fsdp, offload_modules=[]),
    )  # fmt: skip
