"""What EVA settled: A of every target that got a rank, kept in a run's folder, and put into a sharded model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER, IN_FILE, LORA_A, adapter_key
from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.adapters.turns import Starts
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_main
from fsdp_qlora.distributed.shards import fill_slice
from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.quant.packing import raw_bytes


def read_directions(file: Path) -> dict[str, torch.Tensor]:
    """Return A by its name in PEFT's file, float32 ``[r, features]``, on the CPU.

    Raises:
        ModelError: if the file is damaged or holds a value that is not finite.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"lora.init_lora_weights: {file} is damaged: {error}. Remove it, and eva starts anew."
        ) from error
    for name, tensor in tensors.items():
        require_finite(tensor, f"lora.init_lora_weights: {name} in {file}")
    return tensors


def ranks_of(tensors: Mapping[str, torch.Tensor], targets: Iterable[str], ranks: Ranks) -> dict[str, int]:
    """Return the rank of every target, 0 for one without an A, from the tensors on rank 0. A collective."""
    names = {name: f"{IN_FILE}{name}{LORA_A}" for name in targets}
    return on_main(
        lambda: {name: len(tensors[key]) if key in tensors else 0 for name, key in names.items()}, ranks
    )  # fmt: skip


def starts_of(tensors: dict[str, torch.Tensor], facts: dict[str, Any], ranks: Ranks) -> Starts:
    """Return A on rank 0, with its digest on every rank. A collective."""
    return Starts(on_main(lambda: _digest(tensors), ranks), tensors, facts)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def fill_directions(model: nn.Module, starts: Starts, ranks: Ranks) -> None:
    """Give A of every adapter of a sharded model its start, from rank 0. A collective."""
    for name, layer in adapted_layers(model).items():
        parameter = cast(nn.Module, layer).get_submodule(f"lora_A.{ADAPTER}").get_parameter("weight")
        key = f"{adapter_key(name)}{LORA_A}"
        whole = (
            starts.tensors[key].to(ranks.device) if ranks.is_main else torch.empty(parameter.shape, device=ranks.device)
        )
        dist.broadcast(whole, group_src=0, group=ranks.group)
        fill_slice(parameter, whole, ranks.shard_rank, ranks.shard_size)
