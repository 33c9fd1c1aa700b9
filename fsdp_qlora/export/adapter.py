"""Exports the adapter in PEFT's own format: config, safetensors, tokenizer, model card; nothing of our layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import EvaConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from fsdp_qlora.adapters.folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    opened_weights,
    read_adapter_config,
    stored_modules,
)
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.checkpoint.manifest import Manifest
from fsdp_qlora.checkpoint.verify import ADAPTER_FOLDER
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import CheckpointError, NumericsError, StorageError
from fsdp_qlora.export.model_folder import new_folder, put
from fsdp_qlora.files.read import file_sha256, own_file
from fsdp_qlora.files.scratch import fresh_folder, move_into
from fsdp_qlora.files.write import copy_regular, open_as_a_new_file, write_json, write_text
from fsdp_qlora.load.fingerprint import Facts, header_of
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.objectives.pooling import POOLING_FILE
from fsdp_qlora.shapes.modules import around
from fsdp_qlora.shapes.patterns import endings

if TYPE_CHECKING:
    from fsdp_qlora.model.processor import Processor

_BESIDE = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""The files of an adapter's folder."""


def gather_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole adapter on the CPU under PEFT's names. A collective."""
    adapter: dict[str, torch.Tensor] = {}
    for name, parameter in trainable_parameters(model):
        adapter[name] = whole_tensor(parameter.detach()).to("cpu", copy=True).contiguous()
    return adapter


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor over its ranks, on their mesh's device, because its shards may be in host memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    local = tensor.to_local().to(mesh.device_type)
    on_device = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return on_device.full_tensor()


def short_targets(targets: Sequence[str], model: nn.Module) -> list[str]:
    """Return the names' endings (PEFT's usual form) if they match exactly these modules, else the full names.

    Args:
        targets: names of the linears with adapters.
        model: the transformers model, with or without adapters. PEFT matches modules of any kind: CTRL's layers are
            named 0, 1, 2, and so are the linears in their MLPs.
    """
    short = endings(targets)
    adapted = set(targets)
    own = [name for name, _ in model.named_modules() if not adapted.intersection(around(name))]
    meant = [n for n in own if any(n == e or n.endswith("." + e) for e in short)]
    return sorted(short) if set(meant) == set(targets) else sorted(targets)


def as_started(config: PeftConfig, lora: LoraSettings) -> PeftConfig:
    """Return ``config`` with how its adapters started, as PEFT writes it; ``lora`` are the settings as asked for."""
    if lora.starts_from_rows:
        config.init_lora_weights = "eva"  # type: ignore[attr-defined]
        config.eva_config = EvaConfig(  # type: ignore[attr-defined]
            rho=lora.eva_rho, tau=lora.eva_tau, whiten=lora.eva_whiten,
            adjust_scaling_factors=lora.eva_adjust_scaling_factors,
        )  # fmt: skip
    if lora.start is not None:
        config.init_lora_weights = lora.start  # type: ignore[attr-defined]
        if lora.start == "loftq":
            config.loftq_config = {"loftq_bits": 4, "loftq_iter": lora.loftq_iter}  # type: ignore[attr-defined]
    return config


def export_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    base_model: str,
    tokenizer: Processor | None = None,
    model_card: str | None = None,
    beside: Sequence[Path] = (),
    header: Mapping[str, str] | None = None,
    model_config: PreTrainedConfig | None = None,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Write a PEFT adapter folder and verify it; return the size of its weights in bytes. Call it on one rank.

    ``tokenizer`` may be another processor. The files ``beside`` are copied into it. ``header`` are more texts for the
    header of the tensors' file, which plain PEFT reads past. ``model_config`` is written where the base needs another
    config than its own: names of labels. ``more`` are further files: name -> JSON.

    Raises:
        NumericsError: if a value is not finite, or the file does not hold the tensors that were written.
        StorageError: if the folder cannot be written.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"adapter: {name} holds values that are not finite; it is not written.")
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(names := getattr(config, key, None), set):
            setattr(config, key, sorted(names))  # a set's order differs between processes
    with fresh_folder(folder) as staging:  # PEFT and transformers would follow links in `folder`
        try:
            _write_into(staging, tensors, config, tokenizer, model_card, header or {})
            for file in beside:
                copy_regular(file, staging / file.name)
            if model_config is not None:
                model_config.save_pretrained(str(staging))
            for name, value in (more or {}).items():
                (staging / name).parent.mkdir(exist_ok=True)
                write_json(staging / name, value)
        except SafetensorError as error:  # how it reports a full disk
            raise StorageError(f"{folder / WEIGHTS_NAME} cannot be written: {error}.") from error
        size = (staging / WEIGHTS_NAME).stat().st_size
        move_into(staging, folder)
    return size


def _write_into(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    tokenizer: Processor | None,
    model_card: str | None,
    header: Mapping[str, str],
) -> None:
    config.save_pretrained(str(folder))
    file = folder / WEIGHTS_NAME
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt", **header}
    )
    _order_header(file)
    open_as_a_new_file(file)
    with safe_open(file, framework="pt") as written:
        if set(written.keys()) != tensors.keys():
            raise NumericsError(f"{file} does not hold the tensors that were written.")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if model_card is not None:
        write_text(folder / "README.md", model_card)


def _order_header(weights: Path) -> None:
    """Sort the texts in a safetensors header, whose order is random, so that equal adapters are equal files."""
    with weights.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise StorageError(f"{weights}: its header cannot be written in order.")
        file.seek(8)
        file.write(text)


def write_folder(
    source: Path, target: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: Facts | None,
    overwrite: bool = False,
) -> int:  # fmt: skip
    """Write an adapter folder with what lies beside the adapter in ``source``; return the bytes of its weights.

    ``target`` may be ``source``; with ``overwrite`` it is replaced as a whole. What an adapter started from is not
    copied. ``base`` is the fingerprint of the base that the tensors are for, for the header; None = not known.

    Raises:
        ModelError: if ``target`` is not empty, without ``overwrite``.
        StorageError: if it cannot be written.
    """
    with new_folder(target, partial(put, overwrite=overwrite)) as staging:
        return fill_folder(staging, source, tensors, config, base)


def fill_folder(
    folder: Path, source: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: Facts | None
) -> int:  # fmt: skip
    """Write what `write_folder` writes into an existing folder; return the bytes of the weights.

    Raises:
        OSError: if the folder cannot be written; SafetensorError, if the weights cannot.
    """
    for file in sorted(source.iterdir()):
        if file.name not in (CONFIG_NAME, WEIGHTS_NAME, FILE_NAME) and file.is_file():
            copy_regular(file, folder / file.name)
    _copy_pooling(source, folder)
    write_json(folder / CONFIG_NAME, config)
    return write_weights(folder, tensors, base)


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], base: Facts | None) -> int:
    """Write an adapter's file of tensors, with the fingerprint of the base that they are for; return its bytes.

    Raises:
        OSError: if it cannot be written, or SafetensorError.
    """
    weights = folder / WEIGHTS_NAME
    save_file({n: t.contiguous() for n, t in tensors.items()}, weights, metadata={"format": "pt", **header_of(base)})
    _order_header(weights)
    open_as_a_new_file(weights)
    return weights.stat().st_size


def copy_folder(adapter: Path, folder: Path) -> None:
    """Copy a PEFT adapter folder, its config, tensors, tokenizer and card, into an existing empty folder.

    Raises:
        ModelError: if it is no adapter that is supported, or holds values that are not finite numbers.
        SecurityError: if a file in it is a link out of it.
        OSError: if the folder cannot be written.
    """
    stored_modules(adapter, read_adapter_config(adapter))
    _require_finite(own_file(adapter, WEIGHTS_NAME), adapter / WEIGHTS_NAME)
    names = {file.name for pattern in _BESIDE for file in adapter.glob(pattern)}
    for name in sorted(names):
        copy_regular(own_file(adapter, name), folder / name)
    _copy_pooling(adapter, folder)


def _copy_pooling(adapter: Path, folder: Path) -> None:
    """Copy what sentence-transformers read of an adapter's pooling, if it is there."""
    if (file := own_file(adapter, POOLING_FILE)).is_file():
        (folder / POOLING_FILE).parent.mkdir(exist_ok=True)
        copy_regular(file, folder / POOLING_FILE)


def copy_adapter(checkpoint: Path, manifest: Manifest, folder: Path) -> None:
    """Copy the adapter of a verified checkpoint into an existing empty folder: the files listed in its manifest.

    Raises:
        CheckpointError: if it has no adapter, or a file is not the one that was verified.
        ModelError: if the adapter holds values that are not finite numbers.
        OSError: if the folder cannot be written.
    """
    names = [name for name in manifest.files if name.startswith(f"{ADAPTER_FOLDER}/")]
    if not names:
        raise CheckpointError(f"{checkpoint} holds no adapter.")
    for name in names:
        copy = folder / name.removeprefix(f"{ADAPTER_FOLDER}/")
        copy.parent.mkdir(exist_ok=True)
        copy_regular(checkpoint / name, copy)
        if file_sha256(copy, follow=False) != manifest.files[name]["sha256"]:
            raise CheckpointError(f"{checkpoint / name} is damaged: its content has changed since it was written.")
    _require_finite(folder / WEIGHTS_NAME, checkpoint / ADAPTER_FOLDER / WEIGHTS_NAME)


def _require_finite(file: Path, called: Path) -> None:
    """Check the values of an adapter's file, which messages call ``called``."""
    with opened_weights(file) as stored:
        for name in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
            require_finite(stored.get_tensor(name), f"adapter: {name} in {called}")
