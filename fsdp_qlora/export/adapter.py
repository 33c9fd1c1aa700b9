"""The adapter in PEFT's own format: config, safetensors, tokenizer, model card. No trace of our layout in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.checkpoint.manifest import Manifest, sha256
from fsdp_qlora.checkpoint.verify import ADAPTER_FOLDER
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.errors import CheckpointError, ModelError, NumericsError, StorageError
from fsdp_qlora.export.adapter_config import CONFIG_NAME, adapted_modules, read_adapter_config
from fsdp_qlora.export.modes import open_as_a_new_file
from fsdp_qlora.files import copy_regular, own_file, write_text
from fsdp_qlora.model.lora import trainable_parameters
from fsdp_qlora.model.stream import fill_slice
from fsdp_qlora.plan.layout import endings
from fsdp_qlora.scratch import fresh_folder, move_into

WEIGHTS_NAME = "adapter_model.safetensors"


def gather_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole adapter on the CPU under PEFT's names. A collective: every rank calls it."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in trainable_parameters(model):
        found[name] = _whole(parameter.detach()).to("cpu", copy=True).contiguous()
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor over its ranks, on the device of their mesh: its shards may be in host memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    local = tensor.to_local().to(mesh.device_type)
    on_device = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return on_device.full_tensor()


def short_targets(targets: Sequence[str], model: nn.Module) -> list[str]:
    """Return the names' endings if PEFT would take them for just these modules (its usual form), else the full names.

    Args:
        targets: names of the linears with adapters.
        model: the transformers model, with or without adapters on it. PEFT looks at modules of every kind: CTRL's
            layers are named 0, 1, 2 as are the linears in their MLPs.
    """
    short = endings(targets)
    own = [name for name, _ in model.named_modules() if ".base_layer" not in name and ".lora_" not in name]
    meant = [n for n in own if any(n == e or n.endswith("." + e) for e in short)]
    return sorted(short) if set(meant) == set(targets) else sorted(targets)


def export_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    base_model: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_card: str | None = None,
) -> int:
    """Write a PEFT adapter folder and read it back; return the bytes of its weights. For one rank to call.

    Raises:
        NumericsError: if a value is not finite or the file does not hold what was written.
        StorageError: if it cannot be written.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"adapter: {name} holds values that are not finite numbers; it is not written.")
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
    with fresh_folder(folder) as staging:  # PEFT and transformers would write through links that lie in `folder`
        try:
            _write_into(staging, tensors, config, tokenizer, model_card)
        except SafetensorError as error:  # what it makes of a full disk
            raise StorageError(f"{folder / WEIGHTS_NAME} cannot be written: {error}.") from error
        size = (staging / WEIGHTS_NAME).stat().st_size
        move_into(staging, folder)
    return size


def _write_into(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model_card: str | None,
) -> None:
    config.save_pretrained(str(folder))
    file = folder / WEIGHTS_NAME
    save_file(dict(tensors), file, metadata={"format": "pt"})
    open_as_a_new_file(file)
    with safe_open(file, framework="pt") as written:
        if set(written.keys()) != tensors.keys():
            raise NumericsError(f"{file} does not hold the tensors that were written.")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if model_card is not None:
        write_text(folder / "README.md", model_card)


def copy_adapter(checkpoint: Path, manifest: Manifest, target: Path) -> None:
    """Copy the adapter of a verified checkpoint: the files that its manifest names, and no others.

    Raises:
        CheckpointError: if it has none, or a file is not the one that was verified.
        ModelError: if the adapter holds values that are not finite numbers.
    """
    names = [name for name in manifest.files if name.startswith(f"{ADAPTER_FOLDER}/")]
    if not names:
        raise CheckpointError(f"{checkpoint} holds no adapter.")
    with fresh_folder(target) as staging:
        for name in names:
            copy = staging / name.removeprefix(f"{ADAPTER_FOLDER}/")
            copy.parent.mkdir(exist_ok=True)
            copy_regular(checkpoint / name, copy)
            if sha256(copy) != manifest.files[name]["sha256"]:
                raise CheckpointError(f"{checkpoint / name} is damaged: its content is not what was written.")
        with _opened(staging / WEIGHTS_NAME) as stored:
            for name in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                _require_finite(name, stored.get_tensor(name), checkpoint / ADAPTER_FOLDER / WEIGHTS_NAME)
        move_into(staging, target)


def _require_finite(name: str, values: torch.Tensor, file: Path) -> None:
    if not bool(torch.isfinite(values.float()).all()):  # 8-bit floats know no isfinite
        raise ModelError(f"adapter: {name} in {file} holds values that are not finite numbers.")


def stored_modules(folder: Path, r: int | None = None) -> list[str]:
    """Return the names of the modules that an adapter folder has tensors for.

    Raises:
        ModelError: if there is no file of tensors, one that holds other things than LoRA matrices, or of a rank other
            than ``r``.
        SecurityError: if the file is a link to elsewhere.
    """
    file = own_file(folder, WEIGHTS_NAME)
    if not file.is_file():
        raise ModelError(f"adapter: {folder} has no {WEIGHTS_NAME}.")
    with _opened(file) as stored:
        names = stored.keys()
        for name in names if r is not None else ():
            if name.endswith("lora_A.weight") and (shape := stored.get_slice(name).get_shape())[:1] != [r]:
                raise ModelError(f"adapter: {folder / CONFIG_NAME} says r={r}, but {name} is {shape} in {file}.")
        return adapted_modules(names, file)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ModelError(f"adapter: {file} is damaged: {error}.") from error


@torch.no_grad()
def load_adapter(folder: Path, model: nn.Module, shard_rank: int = 0, shard_size: int = 1) -> None:
    """Fill a model's adapters from a PEFT adapter folder.

    Raises:
        ModelError: if its tensors are not just the model's, by name and shape.
    """
    file = own_file(folder, WEIGHTS_NAME)
    parameters = dict(trainable_parameters(model))
    modules = stored_modules(folder)
    with _opened(file) as stored:
        names = set(stored.keys())
        if odd := sorted(names ^ parameters.keys()):
            ours = sorted(set(adapted_modules(parameters, file)) - set(modules))
            hint = f" It has no adapter for {ours[0]}: set lora.target_modules to its own." if ours else ""
            raise ModelError(f"adapter: {file} and the model differ in {len(odd)} tensors, first {odd[0]}.{hint}")
        for name, parameter in parameters.items():
            value = stored.get_tensor(name)
            if value.shape != parameter.shape:
                raise ModelError(f"adapter: {name} is {list(value.shape)} in {file}, not {list(parameter.shape)}.")
            _require_finite(name, value, file)
            fill_slice(parameter, value, shard_rank, shard_size)


def start_from_adapter(folder: Path, lora: LoraSettings, model: nn.Module, ranks: Ranks) -> None:
    """Fill a model's fresh adapters from a PEFT adapter of an earlier training (``lora.init_from``).

    Raises:
        ModelError: if it was trained with another scaling or does not fit this model's adapters.
    """
    found = read_adapter_config(folder).settings([])
    differ = [
        f"lora.{key}: {ours}, but the adapter in lora.init_from={folder} has {theirs}; set lora.{key}={theirs:{form}}."
        for key, theirs, ours, form in (
            ("r", found.r, lora.r, ""),
            ("alpha", found.alpha, float(lora.alpha), "g"),
            ("variant", found.variant, lora.variant, ""),
        )
        if theirs != ours
    ]
    if differ:
        raise ModelError("\n".join(differ))
    load_adapter(folder, model, ranks.shard_rank, ranks.shard_size)
