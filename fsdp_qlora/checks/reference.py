"""Upstream's side of the twin check: stock transformers, bitsandbytes and PEFT, unsharded with eager attention.

Only the order of the calls is ours: the reference must not be a second path through our own code.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.quant.formats import Format, Packed, dequantize, quantize
from fsdp_qlora.quant.formats.blocks4 import Blocks4

MATRIX_STD, NOISE, WIDE = 0.08, 0.05, 256
_KEPT = 4
"""More positions than any family reserves for purposes other than tokens."""


@dataclass(frozen=True)
class Computed:
    """The losses and gradients of a model for some rows."""

    losses: list[torch.Tensor]
    """For each row, the float32 losses of its tokens after the first."""
    gradients: dict[str, torch.Tensor]
    """Gradients of the adapter parameters, by their names in PEFT's file; empty if not requested."""


def auto_class(name: str | None) -> Any:
    """Return transformers' auto class of this name; None means that of causal language models."""
    return AutoModelForCausalLM if name is None else getattr(transformers, name)


def write_model(
    folder: Path, config: PreTrainedConfig, code: Path | None = None, kind: str | None = None
) -> PreTrainedModel:
    """Save and return a float32 model of ``config`` in which every parameter and saved buffer matters.

    Args:
        folder: the folder to write.
        config: config of a model small enough to build in an instant.
        code: folder with the model's own trusted code, if it has any.
        kind: see `auto_class`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(kind).from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=code is not None
        )
        _randomize(model)
    with _without_bars():
        model.save_pretrained(folder)
    for file in code.glob("*.py") if code is not None else ():
        shutil.copy(file, folder / file.name)
    return model.requires_grad_(False)


@torch.no_grad()
def unusable_positions(model: PreTrainedModel) -> int | None:
    """Return how many of a model's positions no row can use, or None if rows may exceed the number of positions.

    A table of learned positions is finite, and some families reserve its first entries for padding (RoBERTa: two).
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < _KEPT or _runs(model, positions + 1):
        return None
    return next((unusable for unusable in range(_KEPT) if _runs(model, positions - unusable)), None)


def _runs(model: PreTrainedModel, length: int) -> bool:
    try:
        model(input_ids=torch.full((1, length), 4), use_cache=False)
    except Exception:  # remote code asserts; upstream raises index, runtime and value errors
        return False
    return True


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars, because this is not the model that the user is waiting for."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=MATRIX_STD * min(1.0, math.sqrt(WIDE / parameter.shape[-1])))
        elif parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer), alpha=2 * NOISE)


def load(
    folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, kind: str | None = None
) -> PreTrainedModel:
    """Load upstream's model from ``folder`` with eager attention, frozen; ``kind``: see `auto_class`."""
    with _without_bars():
        model = auto_class(kind).from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    model.requires_grad_(False)
    return model.to(device)  # type: ignore[arg-type]


@torch.no_grad()
def round_weights(model: nn.Module, quantized: Iterable[Packed]) -> None:
    """Quantize and dequantize weights in place, matrix by matrix; 4-bit ones with bitsandbytes' own functions."""
    for packed in quantized:
        linear = packed.linear
        parameter = model.get_parameter(linear.parameter)
        for matrix in parameter if linear.stacked else [parameter]:
            whole = (matrix.t() if linear.transposed else matrix).contiguous()
            rounded = _rounded(whole, packed.quant_format)
            matrix.copy_(rounded.t() if linear.transposed else rounded)


def _rounded(whole: torch.Tensor, quant_format: Format) -> torch.Tensor:
    if not isinstance(quant_format, Blocks4):  # our own code, as upstream has none for this format
        return dequantize(quantize(whole, quant_format), quant_format, tuple(whole.shape), whole.dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(
        whole.view(1, -1),  # in one row: the AVX-512 kernel takes the wrong absmax where a block crosses rows
        blocksize=quant_format.block_size,
        quant_type=quant_format.name,
        compress_statistics=quant_format.double_quant,
    )
    return bitsandbytes.functional.dequantize_4bit(codes, state).view_as(whole)


def adapt(model: PreTrainedModel, config: PeftConfig, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return ``model`` wrapped in PEFT adapters with these values."""
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in _adapters(peft_model).items():
            parameter.data = values[name].to(parameter.device, torch.float32).clone()
    return peft_model


def read_adapter(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter values that PEFT loads onto ``model`` from an exported folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # the caller reports these
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    return {name: parameter.detach() for name, parameter in _adapters(adapted).items()}


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(trainable_parameters(model))


def compute(model: nn.Module, rows: Sequence[torch.Tensor], gradients: bool = True) -> Computed:
    """Return losses and gradients, running each row alone, unpadded and unpacked.

    Args:
        model: upstream's model with adapters, in the desired training or evaluation mode.
        rows: token ids, each int64 ``[length]``.
        gradients: whether to compute the gradients of the sum of all losses.
    """
    losses = []
    for row in rows:
        with torch.set_grad_enabled(gradients):
            logits = model(input_ids=row[None], use_cache=False).logits[0].float()
            row_losses = nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")
            if gradients:
                row_losses.sum().backward()
        losses.append(row_losses.detach())
    return Computed(losses, gradients_of(model) if gradients else {})


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the adapter parameters, by their names in PEFT's file; zeros where there are none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in _adapters(model).items()}


@torch.no_grad()
def is_random(model: nn.Module, row: torch.Tensor) -> bool:
    """Whether ``model`` is random in training mode, with all its dropout off."""
    model.train()
    first, second = (model(input_ids=row[None], use_cache=False).logits for _ in range(2))
    return not torch.equal(first, second)


def outputs_of(run: Callable[[], Any], names: Mapping[nn.Module, str]) -> dict[str, torch.Tensor]:
    """Return the outputs of modules during ``run``, by module name, in the order in which they finish."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            outputs.setdefault(names[module], first.detach().float().reshape(-1).clone())

    hooks = [module.register_forward_hook(keep) for module in names]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
