"""Gives a sharded model's adapters their start from the base weights while those are being loaded.

The ranks take turns: of every ``ranks.size`` targets, each rank reads one whole, computes its start alone on one thread
(the bits of an SVD or a QR depend on the number of threads), and lets go of it. It then sends the small factors to the
others; every rank keeps its rows of them, and reads, lowers and quantizes its own rows of the weight. So no bit depends
on the number of ranks, and a rank never holds more than one whole matrix.

A run keeps the factors in a file (`write_starts`), from which a resumed run and an export take them: decomposing again
would take as long as the first time, and another version of a library may give other bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER, LORA_A, LORA_B, adapter_key
from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.adapters.starts import Start, begin
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_every, on_main
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.shards import HOST, fill_slice
from fsdp_qlora.errors import ModelError, StorageError
from fsdp_qlora.files.read import misfit, parse_json
from fsdp_qlora.files.write import open_as_a_new_file, staging_for, sync
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.weights import BaseWeight, LowRank, less
from fsdp_qlora.quant.packing import raw_bytes

FILE_NAME = "initial_adapter.safetensors"
"""The file of factors, in a run's folder and beside every adapter that started from the base weights."""
_PARTS = (*(ending.lstrip(".") for ending in (LORA_A, LORA_B)), "before.left", "before.right")
_FACTS = "fsdp_qlora"


@dataclass
class Starts:
    """The factors of all targets of a loaded model."""

    digest: str = ""
    """sha256 of their bytes, the same on every rank; empty if the adapters did not start from the base weights."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name in the file -> float32, in host memory of rank 0; empty on the others."""


class TakingTurns:
    """Lowers the weights of adapted linears as `stream_weights` loads them, and fills the adapters."""

    def __init__(self, model: nn.Module, lora: LoraSettings, seed: int, ranks: Ranks, kept: Path | None = None) -> None:
        """Prepare the start of the adapters of ``model``.

        Args:
            model: the sharded model.
            lora: the settings; their `LoraSettings.start` says how the adapters start.
            seed: the run's seed.
            ranks: the ranks that load the model.
            kept: a file of factors to take instead of computing them; rank 0 reads it.
        """
        assert lora.start is not None
        self.start, self.iterations, self.seed, self.ranks, self.kept = lora.start, lora.loftq_iter, seed, ranks, kept
        self.layers: dict[nn.Module, tuple[str, Any]] = {
            layer.get_base_layer(): (adapter_key(name), layer) for name, layer in adapted_layers(model).items()
        }
        self.starts, self._hash = Starts(), hashlib.sha256()

    def __call__(self, weights: Sequence[BaseWeight]) -> Iterator[BaseWeight]:
        """Yield the weights in order; those of targets are read without what their adapters take over. A collective.

        Raises:
            FsdpQloraError: identically on every rank, if a weight or the file cannot be read, or lacks a target.
        """
        targets = [weight for weight in weights if weight.module in self.layers]
        turn, mine = 0, None
        for weight in weights:
            if weight.module not in self.layers:
                yield weight
                continue
            place = turn % self.ranks.size
            owner = place if self.kept is None else 0
            if place == 0 or self.kept is not None:
                own = targets[turn + self.ranks.rank :][:1] if self.kept is None else [weight]
                mine = on_every(lambda own=own: self._own(own), self.ranks)
            yield self._lowered(weight, self._share(weight, mine, owner))
            turn += 1
            if owner == self.ranks.rank:
                mine = None
        self.starts.digest = self._hash.hexdigest()

    def _own(self, own: Sequence[BaseWeight]) -> Start | None:
        """Return the start of this rank's target: computed, or, on rank 0, from the file."""
        if not own or (self.kept is not None and not self.ranks.is_main):
            return None
        name, layer = self.layers[own[0].module]
        if self.kept is not None:
            return read_start(self.kept, name)
        if own[0].packed and self.start == "loftq":
            raise ModelError(
                f"lora.init_lora_weights: loftq starts from what quantization loses, and the model's files hold {name} "
                "already quantized; use the 16-bit model they were made from, or choose pissa or olora."
            )
        weight = own[0].whole(self.ranks.device)
        r, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
        return begin(
            self.start, weight, r, scaling, seed_of(self.seed, name), own[0].quant_format, self.iterations
        )  # fmt: skip

    def _share(self, weight: BaseWeight, mine: Start | None, owner: int) -> Start:
        """Return the start of a weight on every rank, from the one that has it."""
        (rows, columns), r = weight.shape, self.layers[weight.module][1].r[ADAPTER]
        shapes = [(r, columns), (rows, r)]
        if self.start == "loftq" and self.iterations > 1:
            shapes += [(rows, r), (r, columns)]
        own = tensors_of(mine) if mine is not None and owner == self.ranks.rank else None
        if own is not None and [tuple(x.shape) for x in own] != shapes:
            there = [list(x.shape) for x in own]
            raise ModelError(f"adapter: {self.kept} has factors of {there} for a weight that needs {shapes}.")
        device, shared = self.ranks.device, []
        for i, shape in enumerate(shapes):
            tensor = torch.empty(shape, device=device) if own is None else own[i].to(device).contiguous()
            dist.broadcast(tensor, group_src=owner, group=self.ranks.group)
            shared.append(tensor)
        return Start(shared[0], shared[1], LowRank(shared[2], shared[3]) if len(shared) > 2 else None)

    @torch.no_grad()
    def _lowered(self, weight: BaseWeight, start: Start) -> BaseWeight:
        name, layer = self.layers[weight.module]
        for kind, value in (("lora_A", start.a), ("lora_B", start.b)):
            parameter = getattr(layer, kind)[ADAPTER].weight
            fill_slice(parameter, value, self.ranks.shard_rank, self.ranks.shard_size)
        for part, tensor in zip(_PARTS, tensors_of(start), strict=False):
            on_host = tensor.to(HOST, copy=self.ranks.is_main).contiguous()
            self._hash.update(f"{name}.{part}".encode())
            self._hash.update(raw_bytes(on_host).numpy().data)
            if self.ranks.is_main:
                self.starts.tensors[f"{name}.{part}"] = on_host
        taken = start.taken(self.start, layer.scaling[ADAPTER])
        if taken is None:
            return weight
        taken = taken.transposed() if weight.transposed else taken
        return replace(weight, read=less(weight.read, taken, self.ranks.device), as_stored=False)


def tensors_of(start: Start) -> list[torch.Tensor]:
    """Return the factors in the order of the file: A, B, and LoftQ's product before the last alternation, if any."""
    return [start.a, start.b, *([] if start.before is None else [start.before.left, start.before.right])]


def read_start(file: Path, name: str) -> Start:
    """Return the start of the target ``name`` (``base_model.model....``) from a file of factors, on the CPU.

    Raises:
        ModelError: if the file is damaged, lacks it, or holds a value that is not finite.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            known = set(stored.keys())
            parts = [stored.get_tensor(key) for part in _PARTS if (key := f"{name}.{part}") in known]
    except SafetensorError as error:
        raise ModelError(f"adapter: {file} is damaged: {error}.") from error
    if len(parts) not in (2, len(_PARTS)):
        raise ModelError(f"adapter: {file} does not hold the initial factors of {name}.")
    for tensor in parts:
        require_finite(tensor, f"adapter: {name} in {file}")
    a, b, *before = (tensor.float() for tensor in parts)
    return Start(a, b, LowRank(before[0], before[1]) if before else None)


def write_starts(file: Path, starts: Starts, facts: Mapping[str, Any]) -> None:
    """Write the factors, with ``facts`` about what they were computed from; on rank 0.

    Raises:
        StorageError: if the file cannot be written.
    """
    staging = staging_for(file)
    try:  # one key: safetensors writes several in any order
        save_file(starts.tensors, staging, metadata={_FACTS: json.dumps(facts, sort_keys=True)})
        open_as_a_new_file(staging)
        sync(staging)
        staging.replace(file)
    except (OSError, SafetensorError) as error:
        staging.unlink(missing_ok=True)
        raise StorageError(f"{file} cannot be written: {error}.") from error


def fits(file: Path, facts: Mapping[str, Any], ranks: Ranks) -> bool:
    """Whether a file of factors is there and was computed from the same ``facts``. Every rank calls it."""
    return on_main(lambda: _said_in(file) == json.dumps(facts, sort_keys=True), ranks)


def _said_in(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as stored:
            return (stored.metadata() or {}).get(_FACTS)
    except (OSError, SafetensorError):  # missing or damaged: they are computed again
        return None


def facts_of(file: Path) -> dict[str, Any]:
    """Return what the factors in a file were computed from.

    Raises:
        ModelError: if it is damaged or says nothing.
    """
    try:
        facts = parse_json((_said_in(file) or "").encode(), dict[str, Any])
    except ValueError as error:
        raise ModelError(f"adapter: {file} is missing, damaged, or does not say what it was made of.") from error
    if (wrong := misfit(facts.get("targets"), dict[str, list[Any]], "targets")) is not None:
        raise ModelError(f"adapter: {file} is malformed: {wrong}.")
    return facts
