"""Checkpoints by hand, without ranks: as one rank saves them, or as a forger makes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fsdp_qlora.checkpoint.manifest import COMPLETE, MANIFEST

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def make_checkpoint(folder: Path, values: float = 1.0) -> dict[str, Any]:
    """Write a checkpoint of one tiny adapter of rank 2; return its manifest."""
    tensors = {NAME.format("A"): torch.full((2, 8), values), NAME.format("B"): torch.full((8, 2), values)}
    (folder / "adapter").mkdir(parents=True)
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / SHARD)
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    manifest = {
        "format": 1, "step": 2, "world_size": 1, "identity": {"run.seed": 1}, "versions": {"torch": "2"},
        "progress": {"step": 2, "position": 4, "recent_losses": [1.0, 2], "best_eval_loss": None, "evaluated_step": -1},
        "tensors": {name: list(tensor.shape) for name, tensor in named.items()},
        "files": {SHARD: {}, "adapter/adapter_model.safetensors": {}, "adapter/adapter_config.json": {}},
    }  # fmt: skip
    vouch(folder, manifest)
    return manifest


def vouch(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the digests of what lies there, and COMPLETE for it."""
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    vouch_for(folder, json.dumps(manifest).encode())


def vouch_for(folder: Path, manifest: bytes) -> None:
    """Write just this as the manifest, and COMPLETE for it."""
    (folder / MANIFEST).write_bytes(manifest)
    (folder / COMPLETE).write_text(hashlib.sha256(manifest).hexdigest() + "\n")
