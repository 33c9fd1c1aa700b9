"""Caches results of the twin check under everything that they depend on, so that a second start skips it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from fsdp_qlora.checks.settings import twin_settings
from fsdp_qlora.checks.small import config_digest
from fsdp_qlora.checks.twin import Verdict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.process import device_name
from fsdp_qlora.files.own_source import own_source
from fsdp_qlora.files.write import write_json
from fsdp_qlora.model.cut import LAYERS, cut_config

_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger-kernel", "flash-attn",
    "flash-attn-3",
    "flash-linear-attention", "fla-core", "causal-conv1d", "mamba-ssm", "kernels", "tilelang",
)  # fmt: skip
"""Packages that compute something, or provide kernels that transformers uses if they are installed."""
_GROUPS = ("quant", "lora", "precision", "train", "fsdp", "debug")
_NO_MATTER = {
    "lora": ("init_from",),
    "train": ("max_steps", "num_epochs", "global_batch_size", "log_every", "eval_every", "eval_batch_size",
              "early_stopping_patience", "on_nonfinite", "spike_factor", "max_bad_steps", "sample_prompts",
              "sample_tokens", "sample_at_eval", "compile", "max_grad_norm"),
}  # fmt: skip
"""Settings of these groups that do not affect the check."""


def twin_key(
    config: RunConfig, model_config: PreTrainedConfig, code: Iterable[Path], candidates: Iterable[str],
    device: torch.device, num_ranks: int,
) -> str:  # fmt: skip
    """Return a digest of everything that a result depends on; models with identical twins share it.

    Args:
        config: the run's settings.
        model_config: the model's config.
        code: files of the model's own code: upstream's module, or those in the folder.
        candidates: attention implementations to try.
        device: the device to compute on, which enters by name.
        num_ranks: ranks that share the model.
    """
    settings = asdict(twin_settings(config, Path("twin"), "", device))
    chosen: dict[str, Any] = {
        group: {k: v for k, v in settings[group].items() if k not in _NO_MATTER.get(group, ())} for group in _GROUPS
    }
    try:
        own = cut_config(model_config, config.data.max_length).to_dict()
    except Exception:  # there is no twin, which the check will report
        own = model_config.to_dict()
    own["depth"] = min(getattr(model_config.get_text_config(), "num_hidden_layers", None) or 0, LAYERS)
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        own.pop(key, None)
    everything = {
        "settings": chosen,
        "data": [config.data.packing, config.data.padding_free],
        "config": own,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(code)],
        "candidates": list(candidates),
        "device": device_name(device),
        "ranks": num_ranks,
        "versions": [_version(name) for name in _LIBRARIES],
        "fsdp_qlora": own_source(),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:40]


def recall(folder: Path, key: str, model_config: PreTrainedConfig) -> Verdict | None:
    """Return the result cached under ``key``, or None if there is none or it cannot be read.

    A result from real layers, used where no small ones could be built, is valid for that model only.
    """
    try:
        kept = json.loads((folder / f"{key}.json").read_text())
        unusable = kept["unusable_positions"]
        fell = {str(k): str(v) for k, v in kept["fell"].items()}
        if kept["layers_of"] not in (None, config_digest(model_config)):
            return None
        return Verdict(str(kept["attention"]), fell, None if unusable is None else int(unusable), kept["layers_of"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(folder: Path, key: str, verdict: Verdict) -> None:
    """Cache a result; if the folder cannot be written, the next start checks again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{key}.json", asdict(verdict))
    except OSError:
        return


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"
