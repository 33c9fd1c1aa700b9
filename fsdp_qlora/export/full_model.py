"""Exports a base that was trained itself: a folder that plain transformers' ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.export.adapter import whole_tensor
from fsdp_qlora.files.read import own_file
from fsdp_qlora.files.scratch import fresh_folder, move_into
from fsdp_qlora.files.write import copy_regular
from fsdp_qlora.model.config import GENERATION

if TYPE_CHECKING:
    from fsdp_qlora.model.processor import Processor


def gather_base(model: nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """Gather the trained parameters one by one, rounded to ``dtype``, under their names in the base's files.

    A collective. Only ranks that ``keep`` them return any: the others hold no more than one at a time.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trainable_parameters(model):
        whole = whole_tensor(parameter.detach())
        if keep:
            tensors[name] = whole.to(dtype).to("cpu", copy=True).contiguous()
    return tensors


def export_model(
    folder: Path,
    skeleton: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Processor,
    base: Path,
) -> int:
    """Write model and tokenizer or image processor; return the bytes of the weights' files. Call it on one rank.

    Args:
        folder: the folder to write.
        skeleton: the model on meta, as transformers builds it: it knows its names and config in the files.
        tensors: the parameters by name.
        tokenizer: the tokenizer, or the image processor.
        base: the base model's folder, for its generation_config.json.

    Raises:
        NumericsError: if a value is not finite.
        SecurityError: if the base's generation_config.json links outside its folder.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"model: {name} holds values that are not finite; it is not written.")
    with fresh_folder(folder) as staging:
        skeleton.save_pretrained(staging, state_dict=dict(tensors))
        tokenizer.save_pretrained(str(staging))
        if (base / GENERATION).is_file():  # a model that is built from its config alone does not know it
            copy_regular(own_file(base, GENERATION), staging / GENERATION)
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        move_into(staging, folder)
    return size
