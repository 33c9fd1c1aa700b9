"""Caches results of the checks under everything that they depend on, so that a second start skips them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from fsdp_qlora.checks.settings import twin_settings
from fsdp_qlora.checks.small import config_digest
from fsdp_qlora.checks.verdict import Verdict
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
              "sample_tokens", "sample_at_eval", "sample_held_out", "max_grad_norm"),
}  # fmt: skip
"""Settings of these groups that do not affect a check."""
_AGREES = {"agrees": True}


def twin_key(
    config: RunConfig, model_config: PreTrainedConfig, code: Iterable[Path], candidates: Iterable[str],
    device: torch.device, num_ranks: int,
) -> str:  # fmt: skip
    """Return a digest of everything that the twin's result depends on; models with identical twins share it.

    Args:
        config: the run's settings.
        model_config: the model's config.
        code: files of the model's own code: upstream's module, or those in the folder.
        candidates: attention implementations to try.
        device: the device to compute on, which enters by name.
        num_ranks: ranks that share the model.
    """
    try:
        own = cut_config(model_config, config.data.max_length).to_dict()
    except Exception:  # there is no twin, which the check will report
        own = model_config.to_dict()
    own["depth"] = min(getattr(model_config.get_text_config(), "num_hidden_layers", None) or 0, LAYERS)
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        own.pop(key, None)
    depends = {
        "objective": config.objective.name,
        "settings": _settings(twin_settings(config, Path("twin"), "", device), "compile"),
        "data": [config.data.packing, config.data.padding_free],
        "config": own,
        "candidates": list(candidates),
    }
    return _key(depends, code, device, num_ranks)


def agreement_key(
    config: RunConfig, model_config: PreTrainedConfig, code: Iterable[Path], files: Mapping[str, str],
    device: torch.device, num_ranks: int, first_added: int | None = None,
) -> str:  # fmt: skip
    """Return a digest of everything that `agree.require_losses_agree` depends on, the base model's weights included.

    Args:
        config: the run's settings, with every ``auto`` resolved.
        model_config: the model's config.
        code: files of the model's own code.
        files: fingerprints of the base model's weight files, as `load.safetensors.file_digests` returns them.
        device: the device to compute on, which enters by name.
        num_ranks: ranks that share the model.
        first_added: id of the first added token, if any.
    """
    depends = {
        "settings": _settings(config),
        "attention": config.model.attn_implementation,
        "added tokens": [config.model.add_tokens, first_added],
        "config": config_digest(model_config),
        "files": dict(files),
    }
    return "agrees-" + _key(depends, code, device, num_ranks)


def _settings(config: RunConfig, *no_matter: str) -> dict[str, Any]:
    """Return the settings that affect a check, by group, without those named."""
    settings = asdict(config)
    return {
        group: {k: v for k, v in settings[group].items() if k not in (*_NO_MATTER.get(group, ()), *no_matter)}
        for group in _GROUPS
    }


def _key(depends: Mapping[str, Any], code: Iterable[Path], device: torch.device, num_ranks: int) -> str:
    """Return a digest of ``depends`` and of the code, libraries and machine that compute."""
    everything = {
        **depends,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(code)],
        "device": device_name(device),
        "ranks": num_ranks,
        "versions": [_version(name) for name in _LIBRARIES],
        "fsdp_qlora": own_source(),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:40]


def recall(folder: Path, key: str, model_config: PreTrainedConfig) -> Verdict | None:
    """Return the twin's result cached under ``key``, or None if there is none or it cannot be read.

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
    """Cache a result of the twin check; if the folder cannot be written, the next start checks again."""
    _write(folder / f"{key}.json", asdict(verdict))


def recall_agreement(folder: Path, key: str) -> bool:
    """Return whether the losses are known to agree under ``key``."""
    try:
        return json.loads((folder / f"{key}.json").read_text()) == _AGREES
    except (OSError, ValueError):
        return False


def remember_agreement(folder: Path, key: str) -> None:
    """Cache that the losses agree; if the folder cannot be written, the next start compares again."""
    _write(folder / f"{key}.json", _AGREES)


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError:
        return


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"
