"""What is walked: a `Variant`, its settings as a `RunConfig`, and the models.

Imports no torch of its own, so that pytest can list the variants cheaply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fsdp_qlora.config.schema import RunConfig, from_dict

LENGTH = 48
STEPS = (1, 2, 3)
"""The first makes the optimizer's state, the first two check gradients, and the third is like all later ones."""


@dataclass(frozen=True)
class Variant:
    """Settings of a walk; those left out are the defaults of a run."""

    family: str = "llama"
    world_size: int = 2
    batch: str = "padded"
    """``padded``, ``packed`` (rows share sequences), or ``flat`` (one row for varlen attention)."""
    rows: int = 1
    """Rows of a micro-batch."""
    accumulation: int = 2
    steps: tuple[int, ...] = STEPS
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    backend: str = "aot_eager"
    """What stands for inductor, which asks the card itself: ``aot_eager`` or, in half the time, ``eager``."""
    plant: str | None = None
    """Name of a fault to plant, in `PLANTS`."""
    plant_in: str = "train"
    """``train``, or ``generate``: the fault is planted after the steps and the evaluation."""


def config_of(folder: Path, variant: Variant) -> RunConfig:
    """Return the settings of a run of ``variant`` on the model in ``folder``."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder)},
        "plan": {"gpu": "80GiB"},
        "data": {"max_length": LENGTH, "packing": variant.batch != "padded"},
        "lora": {"r": 16, "dropout": 0.0},
        "train": {
            "global_batch_size": variant.rows * variant.accumulation * variant.world_size,
            "micro_batch_size": variant.rows,
            "activation_checkpointing": "none",
            "compile": "false",
        },
    }
    for group, settings in variant.settings.items():
        values[group] = {**values.get(group, {}), **settings}
    return from_dict(values)


TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "experts": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_folder(root: Path, family: str) -> Path:
    """Write the config of a small model; it has no weights."""
    folder = root / family
    settings = TINY | FAMILIES[family]
    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
    return folder
