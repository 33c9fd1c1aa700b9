"""Visits a sharded model unit by unit, each gathered while it is looked at."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule


def gathered_units(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the modules of each FSDP unit, gathered; without FSDP, all modules. A collective.

    Parameters of a gathered unit are not those that are trained: write into these after the unit is left.
    """
    units: dict[nn.Module, list[nn.Module]] = {}

    def visit(module: nn.Module, unit: nn.Module) -> None:
        unit = module if isinstance(module, FSDPModule) else unit
        units.setdefault(unit, []).append(module)
        for child in module.children():
            visit(child, unit)

    visit(model, model)
    for unit, modules in units.items():
        if isinstance(unit, FSDPModule):
            unit.unshard()
        yield modules
        if isinstance(unit, FSDPModule):
            unit.reshard()
