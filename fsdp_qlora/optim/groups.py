"""Groups of parameters with learning rates and weight decays of their own, as LoRA+ asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.optim.state import Leaf

SCALE = "lr_scale"
"""Key of a group's learning rate relative to the run's."""


@dataclass(frozen=True)
class Rate:
    """How fast a trained tensor learns."""

    scale: float
    """Its learning rate relative to the run's."""
    weight_decay: float


def groups_of(leaves: Iterable[Leaf], settings: OptimSettings) -> list[dict[str, Any]]:
    """Return torch's parameter groups of ``leaves``: one for each pair of `SCALE` and ``weight_decay``."""
    groups: dict[Rate, list[Any]] = {}
    for leaf in leaves:
        scale = 1.0 if leaf.lr_scale is None else leaf.lr_scale
        decay = settings.weight_decay if leaf.weight_decay is None else leaf.weight_decay
        groups.setdefault(Rate(scale, decay), []).append(leaf.local)
    return [
        {"params": parameters, SCALE: rate.scale, "weight_decay": rate.weight_decay}
        for rate, parameters in groups.items()
    ]
