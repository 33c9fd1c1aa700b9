"""The judge: stock transformers + bitsandbytes' functional quantization + PEFT, and a tiny model of any family."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import from_main, gather_json


def write_random(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save a model of ``config`` in which every parameter and every persistent buffer matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    randomize(model)
    model.save_pretrained(folder)
    return folder


def write_everywhere(ranks: Ranks, folder: Path, config: PreTrainedConfig) -> Path:
    """Save a random model on every rank; transformers' ``save_pretrained`` writes on the first one alone."""
    files: dict[str, bytes] = {}
    problem = ""
    if ranks.is_main:
        try:
            write_random(folder, config)
            model = load(folder, torch.float32)
            logits = model(input_ids=torch.full((1, 48), 5), use_cache=False).logits
            assert bool(torch.isfinite(logits).all()), "values that are not finite"
            files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    problem, sizes = gather_json([problem, {name: len(data) for name, data in files.items()}], ranks)[0]
    if problem:
        raise ValueError(problem)
    received = from_main(b"".join(files.values()), ranks)
    for name, size in sizes.items():
        (folder / name).write_bytes(received[:size])
        received = received[size:]
    return folder


@torch.no_grad()
def add_noise(model: nn.Module, scale: float) -> None:
    """Add normal noise to everything that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * scale)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give matrices values of 0.08 (less in wide ones) and all else noise around what the constructor made."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08 * min(1.0, (256 / parameter.shape[-1]) ** 0.5))
        elif parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name in saved:
            buffer.add_(torch.randn_like(buffer) * 0.1)


def load(folder: Path, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """Return upstream's own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def rounded_to_nf4(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix after bitsandbytes' NF4 with double quantization."""
    flat = matrix.reshape(1, -1)  # of rows that blocks cross, the AVX-512 kernel takes the wrong absmax
    codes, state = bitsandbytes.functional.quantize_4bit(flat, quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(codes, state).view_as(matrix)


@torch.no_grad()
def round_to_nf4(model: nn.Module, weights: Iterable[str], transposed: Iterable[str] = ()) -> None:
    """Send the named parameters through bitsandbytes' NF4 with double quantization, each matrix by itself."""
    turned = set(transposed)
    for name in weights:
        parameter = model.get_parameter(name)
        for matrix in parameter if parameter.dim() == 3 else [parameter]:
            whole = (matrix.t() if name in turned else matrix).contiguous()
            rounded = rounded_to_nf4(whole)
            matrix.copy_(rounded.t() if name in turned else rounded)


def adapt(model: nn.Module, targets: list[str], tensors: dict[str, torch.Tensor], r: int, alpha: float) -> nn.Module:
    """Put a PEFT adapter with these values on upstream's model."""
    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    own = {n.replace(".default.", "."): p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())[:4]
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].data = own[name].data.float()
            own[name].copy_(value)
    return peft_model


def loss_sum(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the sum of the cross entropy of each token after the first, in float32."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def vocab_of(folder: Path) -> int:
    """Return the number of token ids that rows may use."""
    config = json.loads((folder / "config.json").read_text())
    inner = next((v for v in (config, config.get("text_config", {})) if "vocab_size" in v), {})
    return int(inner.get("unpadded_vocab_size") or inner.get("vocab_size", 100))
