"""`torch.compile` by decoder layer: one compilation serves all layers, and FSDP's hooks stay outside of it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

COMPILED_TYPES = frozenset(
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox"]
)
"""Families whose layers are known to be one graph (`tests/unit/test_compile.py`): those that ``auto`` compiles."""


def compile_layers(layers: Sequence[nn.Module], dynamic: bool) -> None:
    """Compile each of ``layers`` when it first runs; call it before `fully_shard`.

    A layer is one graph (``fullgraph``): one that breaks in parts is an error and not slow code. All share the code
    that was compiled for the second; the first, whose input needs no gradient, has its own.

    Args:
        layers: decoder layers.
        dynamic: whether batches differ in length; one compilation then serves all lengths.
    """
    from torch._dynamo import config as dynamo_config  # here: it imports the whole compiler

    # FSDP2 warns that a compiled layer's output is a view; transformers' models never write into it
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    # A checkpointed layer hands products from one linear to the next (`SharedInput`) and is left as it was found:
    # the recomputation is of the graph and has nothing to hand on
    dynamo_config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch.compiler.reset()  # an earlier model's layers in this process would count against the number of recompilations
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=dynamic)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers as they were written: for evaluation and generation, whose shapes would cost compilations."""
    with torch.compiler.set_stance("force_eager"):
        yield


def can_compile(device: torch.device) -> bool:
    """Whether what `torch.compile` needs is here: a C++ compiler for a CPU, Triton for an accelerator."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    return importlib.util.find_spec("triton") is not None
