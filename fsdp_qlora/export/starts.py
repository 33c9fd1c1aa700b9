"""Exports of adapters that started from the base weights: a plain LoRA for the original base, or the base they need.

Such an adapter belongs to what its start left of the base. `plain_lora` moves that into the adapter, as PEFT's
``subtract_mutated_init`` does it: the change is ``B A - B0 A0``, a LoRA of rank 2 r. What then differs is how the base
is rounded: in training, the rest of each weight was quantized, and not the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.adapters.based import fingerprint_in
from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, opened_weights
from fsdp_qlora.adapters.names import IN_FILE, LORA_A, LORA_B
from fsdp_qlora.adapters.turns import FILE_NAME, facts_of
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.export.adapter import fill_folder, write_folder
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stream import weight_of
from fsdp_qlora.load.weights import LowRank, minus
from fsdp_qlora.quant.formats import Format, build_format, dequantize, one_thread, quantize
from fsdp_qlora.shapes.linears import LinearShape
from fsdp_qlora.shapes.tokens import TOKEN_ROWS


class StartedAdapter(StoredAdapter):
    """An adapter folder whose adapter started from the base weights."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            ModelError: if its adapter did not start from the base weights, or the folder lacks what it started from.
        """
        super().__init__(folder)
        if self.config.start is None:
            raise ModelError(
                f"adapter: the one in {folder} did not start from the base weights: it is a plain one of its base."
            )
        file = own_file(folder, FILE_NAME)
        stored = facts_of(file).get("targets", {})
        if stored.keys() != set(self.modules):
            raise ModelError(f"adapter: {file} and {folder / WEIGHTS_NAME} are not of the same modules.")
        self.formats = {name: build_format(*kind) if kind else None for name, kind in stored.items()}
        """How the base was stored in training, by target; None in 16 or 32 bits."""

    def require_format(self, quant_format: Format) -> None:
        """Check that the base was stored in this format in training.

        Raises:
            ConfigError: naming the first target that was not.
        """
        odd = [name for name, kind in self.formats.items() if kind != quant_format]
        if not odd:
            return
        kind = self.formats[odd[0]]
        raise ConfigError(
            f"quant: the adapter in {self.folder} was trained with {odd[0]} in "
            f"{'16 or 32 bits' if kind is None else kind.describe()}, not in {quant_format.describe()}. Set what it "
            "was trained with, or convert it with what=adapter export.plain_lora=true."
        )


@dataclass
class Difference:
    """What a converted adapter changes, over all targets: sums of squares."""

    weights: float = 0.0
    original: float = 0.0
    quantized: float = 0.0

    @property
    def on_original(self) -> float:
        """Root mean square of the difference on the original base, relative to that of the weights."""
        return sqrt(self.original / self.weights)

    @property
    def on_quantized(self) -> float:
        """The same on the base quantized as in training."""
        return sqrt(self.quantized / self.weights)


@torch.no_grad()
def measure(
    adapter: StartedAdapter, linears: Mapping[str, LinearShape], source: SafetensorsFolder
) -> Difference:  # fmt: skip
    """Return how far the weights of the trained model are from those of the converted adapter on the original base.

    One weight is in memory at a time.

    Raises:
        ModelError: if the base lacks a target, or its weight has another shape than the adapter.
    """
    total = Difference()
    with one_thread():
        for name, quant_format in adapter.formats.items():
            linear = linears.get(name)
            if linear is None:
                raise ModelError(f"adapter: {adapter.folder} has an adapter for {name}, which the base does not have.")
            weight = weight_of(source, linear, quant_format)
            start = adapter.start_of(name)
            if (start.b.shape[0], start.a.shape[1]) != tuple(weight.shape):
                raise ModelError(
                    f"adapter: {adapter.folder} is not of this base: {name} is {list(weight.shape)} there."
                )
            taken, product = adapter.taken(name), LowRank(start.b * adapter.scaling(name), start.a)
            rest = weight if taken is None else minus(weight, taken)
            lost = _rounded(rest, quant_format)
            lost += product.left @ product.right
            total.weights += float(weight.square().sum())
            total.original += float((lost - weight).square().sum())
            total.quantized += float((lost - _rounded(weight, quant_format)).square().sum())
    return total


def _rounded(weight: torch.Tensor, quant_format: Format | None) -> torch.Tensor:
    if quant_format is None:
        return weight.clone()
    return dequantize(quantize(weight, quant_format), quant_format, tuple(weight.shape), torch.float32)


def write_plain_lora(adapter: StartedAdapter, target: Path, overwrite: bool = False) -> int:
    """Write the adapter as a plain LoRA of twice the rank for the original base; return the bytes of its weights.

    Raises:
        ModelError: if it trains more than LoRA's two matrices.
        StorageError: if the folder cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    with opened_weights(own_file(adapter.folder, WEIGHTS_NAME)) as stored:
        names = set(stored.keys())
        beside = {name for name in names if name.endswith(TOKEN_ROWS)}.union(adapter.whole_parameters.values())
        if odd := sorted(name for name in names - beside if not name.endswith((LORA_A, LORA_B))):
            raise ModelError(
                f"export.plain_lora: {adapter.folder} also trains {odd[0]}, which no plain LoRA can express; export "
                "the base that it needs with what=base-4bit."
            )
        for name in sorted(names):
            value = stored.get_tensor(name)
            require_finite(value, f"adapter: {name} in {adapter.folder}")
            if name in beside:
                tensors[name] = value
                continue
            module = name.removeprefix(IN_FILE).removesuffix(LORA_A).removesuffix(LORA_B)
            start, first = adapter.start_of(module), name.endswith(LORA_A)
            other = start.a if first else -start.b
            if other.shape != value.shape:
                raise ModelError(
                    f"adapter: {name} in {adapter.folder} is {list(value.shape)}, not {list(other.shape)}."
                )
            tensors[name] = torch.cat([value.float(), other], dim=0 if first else 1).contiguous()
    config = _doubled(read_json(own_file(adapter.folder, CONFIG_NAME)))
    return write_folder(adapter.folder, target, tensors, config, fingerprint_in(adapter.folder), overwrite)


def _doubled(config: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's config with twice the ranks and the same scaling."""
    by = sqrt(2) if config.get("use_rslora") else 2
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return restarted(config) | {
        "r": 2 * config["r"],
        "lora_alpha": by * config["lora_alpha"],
        "rank_pattern": {name: 2 * r for name, r in ranks.items()},
        "alpha_pattern": {name: by * alpha for name, alpha in alphas.items()},
    }


def restarted(config: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's config without the start: plain PEFT leaves the base as it is."""
    return config | {"init_lora_weights": True, "loftq_config": {}}


def write_for_its_base(adapter: StartedAdapter, folder: Path, base: Base, name: Path) -> None:
    """Write the adapter into the new folder ``folder``, for ``base``, which its start was taken off already.

    Its config names ``name`` as the base, which may not be there yet; its fingerprint is of ``base``.

    Raises:
        OSError: if the folder cannot be written; SafetensorError, if the weights cannot.
    """
    with opened_weights(own_file(adapter.folder, WEIGHTS_NAME)) as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    config = restarted(read_json(own_file(adapter.folder, CONFIG_NAME)))
    config |= {"base_model_name_or_path": str(name), "revision": None}
    folder.mkdir()
    fill_folder(folder, adapter.folder, tensors, config, base.fingerprint())
