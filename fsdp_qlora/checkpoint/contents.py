"""The tensors of a checkpoint: what is trained, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

_OPTIM = "optim."


class StatefulOptimizer(Protocol):
    """An optimizer whose state consists of tensors."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return ``<parameter>.<state>`` -> tensor."""
        ...


def checkpoint_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: StatefulOptimizer
) -> dict[str, torch.Tensor]:
    """Return the trained tensors, as ``model.<name>`` and ``optim.<name>.<state>``; the frozen base is never saved."""
    tensors: dict[str, torch.Tensor] = {f"model.{name}": p.detach() for name, p in parameters}
    return tensors | {_OPTIM + name: t for name, t in optimizer.state_tensors().items()}


def optimizer_shapes(tensors: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the shapes of the optimizer state in a checkpoint, by ``<name>.<state>``."""
    return {name.removeprefix(_OPTIM): shape for name, shape in tensors.items() if name.startswith(_OPTIM)}
