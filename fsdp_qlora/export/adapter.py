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

from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.errors import ModelError, NumericsError, StorageError
from fsdp_qlora.export.adapter_config import adapted_modules, read_adapter_config
from fsdp_qlora.export.modes import open_as_a_new_file
from fsdp_qlora.model.lora import trainable_parameters
from fsdp_qlora.model.stream import fill_slice
from fsdp_qlora.plan.layout import endings

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
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order changes from process to process
    config.save_pretrained(str(folder))
    file = folder / WEIGHTS_NAME
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise StorageError(f"{file} cannot be written: {error}.") from error
    open_as_a_new_file(file)
    with safe_open(file, framework="pt") as written:
        if set(written.keys()) != tensors.keys():
            raise NumericsError(f"{file} does not hold the tensors that were written.")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if model_card is not None:
        (folder / "README.md").write_text(model_card, encoding="utf-8", errors="backslashreplace")
    return file.stat().st_size


def stored_modules(folder: Path) -> list[str]:
    """Return the names of the modules that an adapter folder has tensors for.

    Raises:
        ModelError: if there is no file of tensors, or one that holds other things than LoRA matrices.
    """
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise ModelError(f"adapter: {folder} has no {WEIGHTS_NAME}.")
    with _opened(file) as stored:
        return adapted_modules(stored.keys(), file)


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
    file = folder / WEIGHTS_NAME
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
