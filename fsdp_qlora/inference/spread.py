"""A model that plain transformers spreads over all devices of one process, host memory and disk (``device_map``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import get_max_memory
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fsdp_qlora.config.schema import GenerateSettings
from fsdp_qlora.errors import ConfigError, ModelError, typed_line
from fsdp_qlora.model.root import CausalModel

AWAY = ("cpu", "disk")


class SpreadModel(CausalModel):
    """A transformers model whose layers are on several devices; accelerate's hooks move what they read."""

    def __init__(self, model: PreTrainedModel | PeftModel, device: torch.device) -> None:
        super().__init__(model)
        self._first = device

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        return self._first


def memory_limits(limits: Mapping[str, int], device: torch.device) -> dict[int | str, int]:
    """Return the most bytes of weights on each device: ``limits``, else what is free.

    On a process that computes on the CPU (``launcher.device=cpu``), accelerators are left out.
    """
    named = {int(name) if name.isdigit() else name: size for name, size in limits.items()}
    asked: dict[int | str, int] = named or dict(get_max_memory())
    return {key: size for key, size in asked.items() if key == "cpu" or device.type != "cpu"}


def load_spread(
    folder: Path, dtype: torch.dtype, settings: GenerateSettings, packed: BitsAndBytesConfig | None,
    limits: dict[int | str, int], attention: str | None = None, trust_remote_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Load the model in ``folder`` as ``settings.device_map`` says.

    Args:
        folder: a model folder of transformers.
        dtype: what is not quantized gets this dtype.
        settings: the way, and what may be left in host memory and on disk.
        packed: `bitsandbytes_config`; None also for a folder that is quantized already.
        limits: `memory_limits`.
        attention: transformers' name of the attention implementation; None: its own choice.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ConfigError: if the model does not fit so, naming the setting that would help.
        ModelError: if transformers cannot load it, or its files lack tensors.
    """
    more: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if packed is not None:
        more["quantization_config"] = packed
    if settings.offload_folder is not None:
        more["offload_folder"] = str(Path(settings.offload_folder).expanduser())
    try:
        model, told = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder, dtype=dtype, device_map=settings.device_map, max_memory=limits, local_files_only=True,
            use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **more,
        )  # fmt: skip
    except Exception as error:  # whatever upstream's code or the files raise
        raise _explained(error, folder, settings) from error
    if missing := sorted(told["missing_keys"]):
        raise ModelError(f"model.name: {folder} lacks {len(missing)} tensors of the model (first: {missing[0]}).")
    return model.eval()


def _explained(error: Exception, folder: Path, settings: GenerateSettings) -> ConfigError | ModelError:
    text = str(error)
    if "dispatched on the CPU or the disk" in text:
        return ConfigError(
            "generate.offload_fp32: the devices cannot hold the whole quantized model. Set it to true, so that layers "
            "in host memory and on disk are not quantized; raise generate.max_memory; or set quant=none."
        )
    if "offload_folder" in text and settings.offload_folder is None:
        return ConfigError(
            "generate.offload_folder: some weights that do not fit into memory are not in the model's files as they "
            "are needed (converted experts). Give a folder for them, with room for the model."
        )
    return ModelError(
        f"generate.device_map: transformers cannot load {folder} with device_map={settings.device_map}: "
        f"{typed_line(error)}"
    )


def placed(model: PreTrainedModel, device: torch.device) -> dict[str, str]:
    """Return the device of each part of the model by its name; all of it on ``device`` if it is on one."""
    places: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    return {"": str(device)} if places is None else {name: str(place) for name, place in places.items()}


def main_device(places: Mapping[str, str], device: torch.device) -> torch.device:
    """Return the device that inputs go to, and that computes what is in host memory or on disk, as accelerate does.

    A place that is a number is one of ``device``'s kind.
    """
    first = next((place for place in places.values() if place not in AWAY), "cpu")
    return torch.device(device.type, int(first)) if first.isdigit() else torch.device(first)


def describe(model: PreTrainedModel, places: Mapping[str, str]) -> str:
    """Return how many bytes of weights are where, as a line."""
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner = max((part for part in places if not part or f"{name}.".startswith(f"{part}.")), key=len, default="")
        sizes[places.get(owner, "cpu")] += parameter.numel() * parameter.itemsize
    return ", ".join(f"{size / 1e6:,.1f} MB on {_called(place)}" for place, size in sizes.items())


def _called(place: str) -> str:
    return {"cpu": "the CPU", "disk": "disk"}.get(place, f"device {place}")
