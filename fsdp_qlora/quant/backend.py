"""Finds the bitsandbytes backend of a device; the only module that looks into its loader (`cextension`)."""

from __future__ import annotations

from importlib.metadata import version

import bitsandbytes
import torch
from bitsandbytes import cextension

from fsdp_qlora.errors import PlanError

WITHOUT_LIBRARY = ("cpu", "xpu")
"""Device types for which bitsandbytes also has kernels in Python, so they work without its native library."""


def bitsandbytes_backend(device: torch.device) -> str:
    """Return the backend that runs bitsandbytes' ops on ``device``: ``bitsandbytes 0.50.2 (CUDA)``.

    ROCm devices are ``cuda`` to torch, so the name comes from the library that was loaded.

    Raises:
        PlanError: if bitsandbytes does not support the device, or could not load the library it needs there.
    """
    kind = device.type
    if kind not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise PlanError(f"quant: bitsandbytes has no backend for {kind}; it supports {known}. Set quant=none.")
    native = not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    name = kind.upper() if kind in WITHOUT_LIBRARY else cextension.BNB_BACKEND
    if not native and kind not in WITHOUT_LIBRARY:
        raise PlanError(
            f"quant: bitsandbytes could not load its {name} library, so nothing can be quantized on {kind}; `python -m "
            "bitsandbytes` says why. Set quant=none to train on the unquantized base."
        )
    return f"bitsandbytes {version('bitsandbytes')} ({name}{'' if native else ', without its library'})"
