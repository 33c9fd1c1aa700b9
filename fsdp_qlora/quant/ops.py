"""Registers our functions as torch ops, through the public `torch.library`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

NAMESPACE = "fsdp_qlora"


def register(functions: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]]) -> dict[Any, Callable[..., Any]]:
    """Register each function as the op ``torch.ops.fsdp_qlora.NAME``, on all devices; return the functions by op.

    The ops have no autograd formula: they are called inside `torch.autograd.Function`.

    Args:
        functions: by name, the implementation and its fake (shapes and dtypes only). Both take the same arguments; the
            implementation's annotations define the op's schema. Results must be new tensors.
    """
    bodies = {}
    for name, (function, fake) in functions.items():
        full = f"{NAMESPACE}::{name}"
        torch.library.define(full, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(full, "default", function)
        torch.library.register_fake(full, fake)
        bodies[getattr(getattr(torch.ops, NAMESPACE), name).default] = function
    return bodies
