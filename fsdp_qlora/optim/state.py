"""Converts between an optimizer's state on shards and a checkpoint's tensors.

Optimizers here run on plain local tensors and describe their state with `LocalOptimizer.parts`. This module wraps the
state in DTensors for saving, and fills it when loading.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fsdp_qlora.distributed.mesh import host_mesh
from fsdp_qlora.distributed.shards import HOST, local_tensor
from fsdp_qlora.optim.blockwise import fit_blocks, table_shape

ABSMAX = "_absmax"
"""Suffix of the table of an 8-bit state's absmax."""


@dataclass(frozen=True)
class Layout:
    """How a parameter is distributed over ranks; ``mesh`` is None if it is not."""

    shape: tuple[int, ...]
    """Shape over all ranks."""
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]

    @staticmethod
    def of(parameter: torch.Tensor) -> Layout:
        """Return the layout of a plain parameter or one that FSDP2 sharded."""
        if not isinstance(parameter, DTensor):
            return Layout(tuple(parameter.shape), None, ())
        return Layout(tuple(parameter.shape), parameter.device_mesh, tuple(parameter.placements))

    @property
    def _axis(self) -> int:
        return next(i for i, placement in enumerate(self.placements) if isinstance(placement, Shard))

    @property
    def rank(self) -> int:
        """This rank's index among those that share the parameter."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(self._axis)

    @property
    def num_ranks(self) -> int:
        """Number of ranks that share the parameter."""
        return 1 if self.mesh is None else self.mesh.size(self._axis)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of ranks that share the parameter."""
        return None if self.mesh is None else self.mesh.get_group(self._axis)

    def present(self, local: torch.Tensor, shape: Sequence[int], whole: bool = False) -> torch.Tensor:
        """Return this rank's rows of a tensor of ``shape`` (or, if ``whole``, all of it) as a DTensor.

        It stays where ``local`` is: on the mesh's device, or, if offloaded, in host memory.
        """
        if self.mesh is None:
            return local
        mesh = host_mesh(self.mesh) if local.device == HOST else self.mesh
        stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        placements = tuple(Replicate() for _ in self.placements) if whole else self.placements
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@dataclass(frozen=True)
class Leaf:
    """This rank's shard of a trainable parameter, as a local optimizer sees it."""

    name: str
    local: nn.Parameter
    layout: Layout
    lr_scale: float | None = None
    """Its learning rate relative to the run's; None: the same."""
    weight_decay: float | None = None
    """Its weight decay; None: that of the settings."""

    @property
    def numel(self) -> int:
        """Number of elements over all ranks."""
        return prod(self.layout.shape)


@dataclass(frozen=True)
class Part:
    """A state that is a plain tensor in the optimizer's own memory."""

    name: str
    local: torch.Tensor
    shape: tuple[int, ...]
    """Shape over all ranks."""
    whole: bool = False
    """Whether every rank holds all of it."""


@dataclass(frozen=True)
class Blocks:
    """A state in 8-bit blocks: codes (uint8, shaped as the shard) and absmax (float32 ``[blocks]``)."""

    name: str
    codes: torch.Tensor
    absmax: torch.Tensor
    table_of_codes: torch.Tensor


class LocalOptimizer(torch.optim.Optimizer):
    """A torch optimizer over the ``local`` tensors of leaves that can create and describe its state."""

    def group_of(self, leaf: Leaf) -> dict[str, Any]:
        """Return the parameter group of a leaf, with its ``lr`` and ``weight_decay``."""
        return self._group_of[leaf.local]

    @cached_property
    def _group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {parameter: group for group in self.param_groups for parameter in group["params"]}

    @abstractmethod
    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        """Return a state of zeros for a leaf, with step counters at ``step``."""

    @abstractmethod
    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        """Return the parts of a leaf's state, without scalars, which all follow from the step."""


def present(leaf: Leaf, part: Part | Blocks) -> dict[str, torch.Tensor]:
    """Return a part as stored in a checkpoint, ``<parameter>.<state>`` -> tensor."""
    name, layout = f"{leaf.name}.{part.name}", leaf.layout
    if isinstance(part, Part):
        return {name: layout.present(_alone(part.local), part.shape, part.whole)}
    shape = table_shape(layout.shape, layout.num_ranks)
    row = part.absmax.new_zeros(1, shape[1])
    row[0, : part.absmax.numel()] = part.absmax
    return {name: layout.present(_alone(part.codes), layout.shape), name + ABSMAX: layout.present(row, shape)}


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its own storage: DCP's stager (torch 2.13) fails on DTensors that share one."""
    return tensor if 0 < tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class StateLoad:
    """The tensors to load a checkpoint into, and the copies from there into the optimizer's memory.

    The two are not always the same: 8-bit states saved by another number of ranks have other blocks.
    """

    def __init__(self, leaves: Sequence[Leaf], optimizer: LocalOptimizer, saved: Mapping[str, Sequence[int]]) -> None:
        """Prepare tensors for the ``saved`` shapes, by the names of `state_tensors`."""
        self._tensors: dict[str, torch.Tensor] = {}
        self._fill: list[Callable[[], None]] = []
        for leaf in leaves:
            for part in optimizer.parts(leaf):
                self._tensors |= present(leaf, part)
                if isinstance(part, Part):
                    self._copy(f"{leaf.name}.{part.name}", part.local)
                else:
                    self._copy(f"{leaf.name}.{part.name}", part.codes)
                    self._add_table(leaf, part, saved.get(f"{leaf.name}.{part.name}{ABSMAX}"))

    def _copy(self, name: str, into: torch.Tensor) -> None:
        tensor = self._tensors[name]
        self._fill.append(lambda: into.copy_(local_tensor(tensor).detach()))  # type: ignore[func-returns-value]

    def _add_table(self, leaf: Leaf, part: Blocks, saved: Sequence[int] | None) -> None:
        layout, name = leaf.layout, f"{leaf.name}.{part.name}{ABSMAX}"
        others = saved is not None and len(saved) == 2 and saved[0] > 0 and saved[0] != layout.num_ranks
        if saved is None or not others or tuple(saved) != table_shape(layout.shape, saved[0]):
            row = self._tensors[name]
            self._fill.append(lambda: part.absmax.copy_(local_tensor(row).detach()[0, : part.absmax.numel()]))  # type: ignore
            return
        table = self._tensors[name] = torch.zeros(tuple(saved))  # a plain tensor, so every rank reads all of it
        self._fill.append(
            lambda: fit_blocks(
                part.codes, part.absmax, part.table_of_codes, table, layout.shape, layout.rank, layout.num_ranks
            )
        )

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors to load into, ``<parameter>.<state>`` -> tensor."""
        return self._tensors

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the loaded tensors into the optimizer."""
        for fill in self._fill:
            fill()


def parts_of(leaves: Sequence[Leaf], optimizer: LocalOptimizer) -> Iterator[tuple[Leaf, Part | Blocks]]:
    """Yield the parts of the optimizer's state for each leaf that has one."""
    for leaf in leaves:
        if optimizer.state.get(leaf.local):
            for part in optimizer.parts(leaf):
                yield leaf, part
