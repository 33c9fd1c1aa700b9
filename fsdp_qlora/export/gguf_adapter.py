"""What llama.cpp's converter of adapters is given: a plain LoRA that it computes as it was trained.

llama.cpp multiplies each pair of matrices by ``lora_alpha`` over its rank (``llama_adapter_lora_weight::get_scale`` in
src/llama-adapter.h) and reads nothing else of the config, so other scalings are multiplied into B first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, opened_weights
from fsdp_qlora.adapters.names import IN_FILE, LORA_A, LORA_B
from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.vllm import one_scaling
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.shapes.linears import LinearShape

_WAY = "what=gguf writes the model with it folded in"


@dataclass(frozen=True)
class PlainLora:
    """A LoRA folder for the converter."""

    folder: Path
    alpha: float
    pairs: dict[str, tuple[int, int, int]]
    """Linear -> its inputs, rank and outputs."""


@torch.no_grad()
def write_plain(adapter: Path, folder: Path, base: str | None) -> PlainLora:
    """Write a copy of an adapter that llama.cpp computes right, with a single rank and scaling 1.

    Args:
        adapter: a PEFT adapter folder.
        folder: the folder to write.
        base: the base model's name in the copy.

    Raises:
        ModelError: if llama.cpp cannot compute such an adapter.
        StorageError: if the folder cannot be written.
    """
    config = read_json(own_file(adapter, CONFIG_NAME), dict[str, Any])
    with opened_weights(own_file(adapter, WEIGHTS_NAME)) as stored:
        names = sorted(stored.keys())
        if why := _obstacle(config, names):
            raise ModelError(f"what=gguf-adapter: {adapter} {why}.")
        tensors = {name: stored.get_tensor(name).float() for name in names}
    one_scaling(adapter, folder, {**config, "base_model_name_or_path": base, "revision": None}, tensors)
    (folder / "README.md").unlink(missing_ok=True)  # the converter would copy the base's path from it
    written = read_json(folder / CONFIG_NAME, dict[str, Any])
    pairs: dict[str, tuple[int, int, int]] = {}
    for name in (name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)):
        a, b = tensors[name + LORA_A], tensors[name + LORA_B]
        pairs[name.removeprefix(IN_FILE)] = (a.shape[1], a.shape[0], b.shape[0])
    return PlainLora(folder, float(written["lora_alpha"]), pairs)


def require_fits(lora: PlainLora, adapter: Path, linears: Iterable[LinearShape]) -> None:
    """Check that an adapter's matrices are those of linears of its base, which llama.cpp's converter reads right.

    Raises:
        ModelError: naming the first that are not.
    """
    known = {linear.name: linear for linear in linears}
    for name, (inputs, _, outputs) in lora.pairs.items():
        linear = known.get(name)
        if linear is None:
            raise ModelError(f"adapter: {adapter} adapts {name}, which is no linear of its base.")
        if (linear.in_features, linear.out_features) != (inputs, outputs):
            size = [linear.out_features, linear.in_features]
            raise ModelError(f"adapter: {adapter} fits {name} [{outputs}, {inputs}], and its base's is {size}.")
        if linear.transposed:  # the converter transposes the matrices as it does the weight, and they are not
            raise ModelError(
                f"what=gguf-adapter: {name} is stored transposed (Conv1D), and llama.cpp's converter would transpose "
                f"its adapter as well; {_WAY}."
            )


def _obstacle(config: dict[str, Any], names: list[str]) -> str:
    """Return why llama.cpp cannot compute an adapter, or ""."""
    if (kind := config.get("peft_type")) != "LORA":
        return f"is {kind}, and llama.cpp computes LoRA alone; {_WAY}"
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "loftq")):
        return "started from the base weights; export.plain_lora=true converts it, or " + _WAY
    if config.get("target_parameters"):
        return "adapts stacked weights of experts, which llama.cpp's converter does not read"
    odd = [name for name in names if not name.endswith((LORA_A, LORA_B))]
    return f"has tensors such as {odd[0]}, which llama.cpp does not compute; {_WAY}" if odd else ""
