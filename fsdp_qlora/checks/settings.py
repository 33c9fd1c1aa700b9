"""Derives the twin's settings from the run's: the same code paths, with small sizes and nothing random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fsdp_qlora.adapters import build_method
from fsdp_qlora.attention.flatten import reads_boundaries
from fsdp_qlora.config.choices import NONE
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.quant.formats import build_format

LENGTHS = (64, 41)
"""Lengths of the twin's rows: longer than its windows and chunks, and uneven, so that one is padded."""
NO_DROPOUT = 1e-9
"""Dropout rate that takes the code path of dropout but drops nothing."""


def _comparable(name: str) -> str:
    """Return a format whose forward is comparable with upstream's; int8 is not, as it also rounds activations."""
    if name == NONE or build_format(name).dense_forward:
        return name
    return "nf4"  # int8 itself is tested elsewhere (tests/distributed/test_formats.py)


def twin_settings(config: RunConfig, folder: Path, attention: str, device: torch.device) -> RunConfig:
    """Return the settings for the run's twin: the same code paths, small sizes, nothing random."""
    precision = "bf16" if reads_boundaries(attention) and device.type != "cpu" else "fp32"
    quant = replace(config.quant, name=_comparable(config.quant.name), embeddings=_comparable(config.quant.embeddings))
    overrides = {  # without those for numbered layers, which the twin may lack or number differently
        pattern: _comparable(kind)
        for pattern, kind in quant.overrides.items()
        if not any(character.isdigit() for character in pattern)
    }
    targets = config.lora.target_modules
    if isinstance(targets, list | tuple) and any("." in name for name in targets):
        targets = "all-linear"  # full names of layers, which the twin may lack
    data = replace(config.data, train=None, eval=None, max_length=LENGTHS[0])
    sequences = 1 if config.train.micro_batch_size == 1 and not config.train.micro_batch_tokens else 2
    return replace(
        config,
        model=replace(
            config.model, name=str(folder), revision=None, attn_implementation=attention, config_overrides={}
        ),
        data=data,
        quant=replace(quant, allow_16bit=True, overrides=overrides, block_size=min(64, quant.block_size)),
        lora=replace(
            config.lora, r=min(4, config.lora.r), dropout=NO_DROPOUT if config.lora.dropout else 0.0, init_from=None,
            target_modules=targets, options={**config.lora.options, **build_method(config.lora.variant).small},
        ),
        precision=replace(config.precision, name=precision),
        train=replace(
            config.train, micro_batch_size=sequences, micro_batch_tokens=0, logits_chunk=16, compile="false"
        ),
        fsdp=replace(config.fsdp, offload_modules=[]),
    )  # fmt: skip
