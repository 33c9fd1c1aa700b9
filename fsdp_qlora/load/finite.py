"""Values of the files are finite numbers, or they are refused by name."""

from __future__ import annotations

import torch

from fsdp_qlora.errors import ModelError


def require_finite(values: torch.Tensor, what: str) -> None:
    """Check values that were read.

    Raises:
        ModelError: beginning with ``what``, if one is no finite number.
    """
    if not values.is_floating_point() or not values.numel():
        return
    wide = values if values.element_size() > 1 else values.float()  # 8-bit floats know no order
    # The smallest and the largest: NaN comes through both, and no tensor of booleans is made.
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(wide)):
        raise ModelError(f"{what} holds values that are not finite numbers.")
