"""How functions of ours become ops of torch, by its public `torch.library`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

NAMESPACE = "fsdp_qlora"


def register(functions: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]]) -> dict[Any, Callable[..., Any]]:
    """Make an op ``torch.ops.fsdp_qlora.NAME`` of each function, on all devices; return the functions by op.

    The ops are not differentiated: they are called inside of `torch.autograd.Function`.

    Args:
        functions: by name, what it does and what it returns on fake tensors (shapes and dtypes alone). Both take the
            same arguments, whose annotations are the op's schema; results must be new tensors.
    """
    found = {}
    for name, (function, fake) in functions.items():
        full = f"{NAMESPACE}::{name}"
        torch.library.define(full, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(full, "default", function)
        torch.library.register_fake(full, fake)
        found[getattr(getattr(torch.ops, NAMESPACE), name).default] = function
    return found
