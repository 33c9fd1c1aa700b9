"""Run upstream's constructor so that parameters take no memory and buffers are real.

Buffers that no file holds (rotary frequencies, causal masks, position tables) are kept as upstream's constructor and
``_init_weights`` create them, never recreated or guessed. Parameters go to the meta device; ``torch.empty``, which
allocates the large ones, returns meta tensors right away, so that a model of any size can be built within a few hundred
MB of address space.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import guard_torch_init_functions

from fsdp_qlora.load.buffers import in_no_file, persistent_buffers
from fsdp_qlora.quant.matrices import QuantMatrices


class _EmptyOnMeta(TorchFunctionMode):
    """Sends ``torch.empty`` without a device to meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return None  # as it is
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


_MOST_PARAMETERS = 200_000
"""Three times the count of the largest models with separate experts; a config can ask for any number."""


@contextmanager
def parameters_on_meta(most: int = _MOST_PARAMETERS) -> Iterator[None]:
    """Construct every module with its parameters on meta and its buffers on the CPU.

    Raises:
        ValueError: in the constructor that exceeds ``most`` parameters.
    """
    count = itertools.count(1)

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if next(count) > most:
            raise ValueError(f"its config asks for more than {most} parameters")
        return _to_meta(module, name, parameter)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type] - its result counts
    try:
        with _EmptyOnMeta():
            yield
    finally:
        hook.remove()


@torch.no_grad()
def make_buffers(model: PreTrainedModel) -> None:
    """Let upstream's ``_init_weights`` fill the buffers that no file holds, in float32, as ``from_pretrained`` does.

    The constructor ran with the model's dtype as torch's default dtype, so its own values are rounded.
    """
    with guard_torch_init_functions():
        for owner, module in with_owners(model):
            if in_no_file(module) and next(module.buffers(recurse=False), None) is not None:
                owner._init_weights(module)


@torch.no_grad()
def initialize(owner: PreTrainedModel, module: nn.Module) -> None:
    """Let upstream's ``_init_weights`` draw a module's own parameters from torch's generator.

    ``owner`` is the innermost transformers model around it, which knows how.
    """
    with guard_torch_init_functions():
        owner._init_weights(module)


def with_owners(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Yield each module with its innermost enclosing transformers model, which knows how to initialise it."""
    pending: list[tuple[PreTrainedModel, nn.Module]] = [(model, model)]
    while pending:
        owner, module = pending.pop()
        owner = module if isinstance(module, PreTrainedModel) else owner
        yield owner, module
        pending += [(owner, child) for child in module.children()]


def kept_in_float32(model: PreTrainedModel) -> list[str]:
    """Return name patterns of what upstream keeps in float32 in any 16-bit model, from upstream's own list."""
    return sorted(model._keep_in_fp32_modules_strict or ())


def keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make the meta parameters and buffers that upstream keeps in float32 float32, as ``from_pretrained`` does.

    ``from_config`` ignores ``_keep_in_fp32_modules_strict``. (The list without ``strict`` applies to float16 only.)
    """
    patterns = kept_in_float32(model)
    if not patterns or dtype not in (torch.float16, torch.bfloat16):
        return
    matching, _, _ = build_glob_alternation(list(patterns))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if matching.search(name) and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for name, buffer in persistent_buffers(model).items():
        if matching.search(name) and buffer.is_floating_point():
            buffer.data = buffer.data.float()


def float32_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen parameters that stay in float32 in a 16-bit model, by name; empty for a float32 model.

    FSDP would round them when it gathers them, so they are replicated on every rank instead. They are few and small.
    """
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad}
    if all(p.dtype == torch.float32 for p in floating.values()):
        return {}
    return {n: p for n, p in floating.items() if p.dtype == torch.float32}


def left_dense(model: nn.Module) -> frozenset[str]:
    """Return the parameters that transformers' own quantization leaves dense, whatever the format.

    These are convolutions, and modules that transformers keeps in float32 where the others are float16.
    """
    if not isinstance(model, PreTrainedModel):
        return frozenset()
    kept = [f".{name}." for name in {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}]
    names = (name for name, _ in model.named_parameters() if any(key in f".{name}." for key in kept))
    convolutions = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))
    return frozenset(names) | {f"{n}.{key}" for n, m in convolutions for key, _ in m.named_parameters(recurse=False)}


def unmade_buffers(model: nn.Module) -> list[str]:
    """Return the names of buffers that upstream's constructor left uninitialised (``torch.empty``)."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if not isinstance(module, QuantMatrices)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta and name in in_no_file(module)
    ]
