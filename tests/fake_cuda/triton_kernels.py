"""Stands for launches of Triton's kernels: what one is given is checked and recorded, and stays as it is.

A fake tensor has no address to hand to a kernel. All Python around the launches runs: Liger's, and ours.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from fsdp_qlora.model import liger

Launch = Callable[[str, list[torch.Tensor]], None]
"""Called with a kernel's name and the tensors that it is given."""


def missing() -> list[str]:
    """Return which packages of Liger's are missing; FSDP_QLORA_TEST_LIGER may name a folder that holds them."""
    folder = os.environ.get("FSDP_QLORA_TEST_LIGER")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return liger.missing_packages()


@contextlib.contextmanager
def stand_in(launch: Launch) -> Iterator[None]:
    """Call ``launch`` in place of each kernel. Liger must not be imported before: it asks for the device once."""
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        importlib.import_module("liger_kernel.ops")
    kernels = importlib.import_module("triton.runtime.jit").JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            if tensor.device.type != "cuda":  # as Triton does
                raise ValueError(f"{name}: pointer argument cannot be accessed from Triton ({tensor.device} tensor?)")
        launch(name, tensors)

    with mock.patch.object(kernels, "run", run):
        yield


def asked_for(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether these settings run Triton's kernels."""
    return settings.get("train", {}).get("kernels") == "liger"
