"""Rejects files with values that are not finite, and names the tensor."""

from __future__ import annotations

import torch

from fsdp_qlora.errors import ModelError


def require_finite(values: torch.Tensor, what: str) -> None:
    """Check that values read from a file are finite.

    Raises:
        ModelError: starting with ``what``, if any value is not finite.
    """
    if not values.is_floating_point() or not values.numel():
        return
    wide = values if values.element_size() > 1 else values.float()  # aminmax does not support 8-bit floats
    # Minimum and maximum are enough: both propagate NaN. This avoids a boolean tensor of the same size.
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(wide)):
        raise ModelError(f"{what} holds values that are not finite.")
