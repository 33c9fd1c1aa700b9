"""Process group set-up and teardown, choice of device and threads of a rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fsdp_qlora.config.auto import asked
from fsdp_qlora.distributed.meeting import meeting_folder, meeting_store
from fsdp_qlora.distributed.torchrun import is_rank, leftovers
from fsdp_qlora.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """This process's place among the ranks, as set by the launcher's environment."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @staticmethod
    def from_env() -> Placement:
        """Read RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE as set by torchrun; a single process without them.

        If torchrun's variables are incomplete, none is used and a warning is logged.
        """
        env = os.environ
        if not is_rank(env):
            if note := leftovers(env):
                _log.warning("%s", note)
            return Placement(0, 0, 1, 1)
        world, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
        return Placement(rank, int(env.get("LOCAL_RANK", rank)), world, int(env.get("LOCAL_WORLD_SIZE", world)))


ACCELERATORS = ("cuda", "xpu")
"""The supported accelerator types of torch; AMD's (ROCm) are also ``cuda``."""


def device_types() -> dict[str, int]:
    """Return the available device types and their counts; ``cpu`` is last, with 0 for any number of ranks."""
    counts: dict[str, int] = {}
    for name in ACCELERATORS:
        backend = getattr(torch, name)
        if backend.is_available():
            counts[name] = backend.device_count()
    return {**counts, "cpu": 0}


def choose_device(device: str, placement: Placement) -> torch.device:
    """Return this rank's device: of the requested type, or with ``auto`` an accelerator if there is one, else the CPU.

    Raises:
        ConfigError: if the type is not available, or this node has fewer devices than ranks.
    """
    available = device_types()
    kind = asked(device) or next(iter(available))
    if kind not in available:
        raise ConfigError(f"launcher.device: {kind} is not available here; available: {', '.join(available)}.")
    if kind == "cpu":
        return torch.device("cpu")
    if placement.local_world_size > available[kind]:
        raise ConfigError(
            f"launcher.nproc_per_node: {placement.local_world_size} ranks on this node, but only {available[kind]} "
            f"{kind} device(s). Start {available[kind]} rank(s), or set launcher.device=cpu."
        )
    return torch.device(kind, placement.local_rank)


_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Settings of torch's allocator; without expandable segments, batches of changing widths leave gaps in its memory."""


def use_device(device: torch.device) -> None:
    """Make ``device`` the current device of this process."""
    if device.type == "cpu":
        return
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"  # read when memory is first allocated
    torch.accelerator.set_device_index(device.index)


def device_name(device: torch.device) -> str:
    """Return a device's type and, for an accelerator, its model."""
    return "cpu" if device.type == "cpu" else f"{device.type} {device_model(device)}"


def device_model(device: torch.device) -> str:
    """Return an accelerator's model as its driver reports it."""
    return torch.get_device_module(device).get_device_name(device)


def has_cuda_kernels(device: torch.device) -> bool:
    """Whether kernels that are written for NVIDIA's and AMD's GPUs alone run on this type of device."""
    return device.type == "cuda"


def nvidia_level(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA card; None of another device, and of one that is planned for."""
    if not has_cuda_kernels(device) or not torch.cuda.is_available() or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def set_threads(asked: int, local_world_size: int) -> int:
    """Set and return this rank's number of CPU threads: ``asked``, or its share of the cores if 0."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = asked or max(1, cores // local_world_size)
    torch.set_num_threads(threads)
    return threads


@contextmanager
def process_group(device: torch.device, placement: Placement, timeout_seconds: int) -> Iterator[dist.ProcessGroup]:
    """Initialise the default group (NCCL/XCCL on accelerators, gloo on CPU) and always destroy it at the end.

    A single process also gets a group, so that no other code needs a special case. It uses an in-process store: with a
    stale MASTER_ADDR from another program it would wait for a server.
    """
    backend = dist.get_default_backend_for_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    if placement.world_size == 1:
        dist.init_process_group(backend, store=cast(Any, dist).HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        folder = meeting_folder()
        dist.init_process_group(
            backend, rank=placement.rank, world_size=placement.world_size, timeout=timeout,
            store=None if folder is None else meeting_store(folder, placement.world_size),
            device_id=device if device.type != "cpu" else None,
        )  # fmt: skip
    group = dist.group.WORLD
    assert group is not None
    try:
        yield group
        dist.barrier(group)  # otherwise gloo's threads can abort a process that exits before its peers
    finally:
        if dist.is_initialized():  # otherwise it was already destroyed at exit, after an error
            dist.destroy_process_group()
