"""An optimizer's state on shards, and the way between it and a checkpoint's tensors.

An optimizer here runs on plain local tensors and says what they are (`LocalOptimizer.parts`); this module presents them
as DTensors where they are saved, and fills them where they are loaded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.optim.blockwise import fit_blocks, table_shape

ABSMAX = "_absmax"
"""Behind the name of an 8-bit state: the table of its absmax."""


@dataclass(frozen=True)
class Layout:
    """How a parameter is spread over the ranks; ``mesh`` is None where it is not."""

    shape: tuple[int, ...]
    """Over all ranks."""
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]

    @staticmethod
    def of(parameter: torch.Tensor) -> Layout:
        """Return the layout of a parameter that FSDP2 sharded, or of a plain one."""
        if not isinstance(parameter, DTensor):
            return Layout(tuple(parameter.shape), None, ())
        return Layout(tuple(parameter.shape), parameter.device_mesh, tuple(parameter.placements))

    @property
    def _axis(self) -> int:
        return next(i for i, placement in enumerate(self.placements) if isinstance(placement, Shard))

    @property
    def rank(self) -> int:
        """This rank's number among those that share the parameter."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(self._axis)

    @property
    def num_ranks(self) -> int:
        """Ranks that share the parameter."""
        return 1 if self.mesh is None else self.mesh.size(self._axis)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """These ranks."""
        return None if self.mesh is None else self.mesh.get_group(self._axis)

    def present(self, local: torch.Tensor, shape: Sequence[int], whole: bool = False) -> torch.Tensor:
        """Return this rank's rows of a tensor of ``shape`` (or all of it: ``whole``) as a DTensor."""
        if self.mesh is None:
            return local
        stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        placements = tuple(Replicate() for _ in self.placements) if whole else self.placements
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@dataclass(frozen=True)
class Leaf:
    """This rank's shard of a trainable parameter, as a local optimizer sees it."""

    name: str
    local: nn.Parameter
    layout: Layout

    @property
    def numel(self) -> int:
        """Elements over all ranks."""
        return prod(self.layout.shape)


@dataclass(frozen=True)
class Part:
    """A state that is a tensor of numbers, the optimizer's own memory."""

    name: str
    local: torch.Tensor
    shape: tuple[int, ...]
    """Over all ranks."""
    whole: bool = False
    """Every rank has all of it."""


@dataclass(frozen=True)
class Blocks:
    """A state in 8-bit blocks: codes (uint8, shaped as the shard) and absmax (float32 ``[blocks]``)."""

    name: str
    codes: torch.Tensor
    absmax: torch.Tensor
    table_of_codes: torch.Tensor


class LocalOptimizer(torch.optim.Optimizer):
    """A torch optimizer over the ``local`` tensors of leaves that can make its state and say what is in it."""

    @abstractmethod
    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        """Return the state of a leaf as after ``step`` updates, filled with zeros."""

    @abstractmethod
    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        """Return what the state of a leaf consists of, but for scalars, which all follow from the step."""


def present(leaf: Leaf, part: Part | Blocks) -> dict[str, torch.Tensor]:
    """Return a part as a checkpoint holds it, ``<parameter>.<state>`` -> tensor."""
    name, layout = f"{leaf.name}.{part.name}", leaf.layout
    if isinstance(part, Part):
        return {name: layout.present(_alone(part.local), part.shape, part.whole)}
    shape = table_shape(layout.shape, layout.num_ranks)
    row = part.absmax.new_zeros(1, shape[1])
    row[0, : part.absmax.numel()] = part.absmax
    return {name: layout.present(_alone(part.codes), layout.shape), name + ABSMAX: layout.present(row, shape)}


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a storage of its own: DCP's stager (torch 2.13) fails on DTensors that share one."""
    return tensor if 0 < tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class StateLoad:
    """The tensors that a checkpoint is read into, and the way from there into the optimizer's own memory.

    They are not always the same memory: DTensors are on the mesh's device, where states in host memory are not, and
    8-bit states of another number of ranks have other blocks.
    """

    def __init__(self, leaves: Sequence[Leaf], optimizer: LocalOptimizer, saved: Mapping[str, Sequence[int]]) -> None:
        """Take the shapes of what was ``saved`` into account, by the names of `state_tensors`."""
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
        table = self._tensors[name] = torch.zeros(tuple(saved))  # plain, so every rank reads all of it
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
        """Bring what was loaded into the optimizer."""
        for fill in self._fill:
            fill()


def parts_of(leaves: Sequence[Leaf], optimizer: LocalOptimizer) -> Iterator[tuple[Leaf, Part | Blocks]]:
    """Yield what the optimizer holds for each leaf that has a state."""
    for leaf in leaves:
        if optimizer.state.get(leaf.local):
            for part in optimizer.parts(leaf):
                yield leaf, part
