"""The device mesh: ``replicate`` x ``shard``, and the group of all its ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fsdp_qlora.distributed.phases import AT_REST, Phases
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.errors import ConfigError

REPLICATE, SHARD = "replicate", "shard"


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run: the mesh that FSDP shards over and the group for reductions."""

    mesh: DeviceMesh
    """1-D ``(shard,)``, or 2-D ``(replicate, shard)`` for hybrid sharding."""
    group: dist.ProcessGroup
    """All ranks of the mesh."""
    background: dist.ProcessGroup
    """The same ranks over gloo, for one background thread at a time (checkpoints); never used by the main thread."""
    device: torch.device
    phases: Phases = field(default_factory=Phases, compare=False)
    """What this rank is doing; read by the watch, which reports the rank that holds up the others."""
    saving: Phases = field(default_factory=lambda: Phases(name=AT_REST), compare=False)
    """The same for the background thread."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    @property
    def data_rank(self) -> int:
        """Index of this process's part of a global batch; ranks that split a sequence would have the same one."""
        return self.rank

    @property
    def data_size(self) -> int:
        """Number of parts that a global batch is divided into."""
        return self.size

    @property
    def shard_rank(self) -> int:
        """This process's rank on the shard axis."""
        return self.mesh.get_local_rank(SHARD)

    @property
    def shard_size(self) -> int:
        """Number of ranks that share one copy of the parameters."""
        return self.mesh.size(self._axis(SHARD))

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that share one copy of the parameters with this one."""
        return self.mesh.get_group(SHARD)

    @property
    def num_replicas(self) -> int:
        """Number of copies of the parameters."""
        return self.size // self.shard_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def in_background(self) -> Ranks:
        """The same ranks for use in the background thread: gloo group, CPU device, its own phases."""
        return replace(self, group=self.background, device=torch.device("cpu"), phases=self.saving)

    def _axis(self, name: str) -> int:
        assert self.mesh.mesh_dim_names is not None
        return self.mesh.mesh_dim_names.index(name)


def degrees(shard_degree: int, replicate_degree: int, world_size: int) -> tuple[int, int]:
    """Return ``(replicate, shard)``; a ``shard_degree`` of 0 means ``world_size / replicate_degree``.

    Raises:
        ConfigError: if ``replicate_degree`` does not divide ``world_size``, or their product is not ``world_size``.
    """
    if world_size % replicate_degree:
        raise ConfigError(
            f"fsdp.replicate_degree: {replicate_degree} does not divide the number of ranks, {world_size}; choose a "
            "number that does, or start another number of ranks."
        )
    shard = shard_degree or world_size // replicate_degree
    if shard * replicate_degree != world_size:
        copies = (
            f"fsdp.replicate_degree={world_size // shard} for as many copies, or " if world_size % shard == 0 else ""
        )
        raise ConfigError(
            f"fsdp.shard_degree: {shard} x fsdp.replicate_degree {replicate_degree} is not the number of ranks, "
            f"{world_size}; set {copies}fsdp.shard_degree=0 to derive it."
        )
    return replicate_degree, shard


def build_mesh(device: torch.device, shard_degree: int, replicate_degree: int, world_size: int) -> DeviceMesh:
    """Build the mesh over the default group's ranks."""
    replicate, shard = degrees(shard_degree, replicate_degree, world_size)
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=(REPLICATE, SHARD))


@cache
def host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return a mesh of the same ranks and groups for DTensors in host memory: a tensor must be where its mesh is."""
    if mesh.device_type == HOST.type:
        return mesh
    if mesh.ndim == 1:
        return DeviceMesh.from_group(mesh.get_group(), HOST.type, mesh_dim_names=mesh.mesh_dim_names)
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    return DeviceMesh.from_group(groups, HOST.type, mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def build_ranks(
    group: dist.ProcessGroup, device: torch.device, shard_degree: int = 0, replicate_degree: int = 1
) -> Ranks:
    """Build the mesh and the background group over the default group's ranks."""
    mesh = build_mesh(device, shard_degree, replicate_degree, dist.get_world_size(group))
    background = dist.new_group(backend="gloo")
    assert isinstance(background, dist.ProcessGroup)
    return Ranks(mesh, group, background, device)
