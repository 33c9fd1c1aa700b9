"""Process group up and down, device choice and threads.

Every function takes its group explicitly, so that tests can run on sub-groups of one pool of processes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from fsdp_qlora.config.decided import asked
from fsdp_qlora.distributed.cgroup import memory_limit
from fsdp_qlora.distributed.meeting import meeting_folder, meeting_store
from fsdp_qlora.distributed.torchrun import is_rank, leftovers
from fsdp_qlora.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where this process stands among the ranks, as the launcher's environment says."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @staticmethod
    def from_env() -> Placement:
        """Read RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, as torchrun sets them; one process without them.

        Where only some of torchrun's variables are there, none is read, and a note says so.
        """
        env = os.environ
        if not is_rank(env):
            if note := leftovers(env):
                _log.warning("%s", note)
            return Placement(0, 0, 1, 1)
        world, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
        return Placement(rank, int(env.get("LOCAL_RANK", rank)), world, int(env.get("LOCAL_WORLD_SIZE", world)))


ACCELERATORS = ("cuda", "xpu")
"""torch's device types that we choose among; AMD's (ROCm) are ``cuda``, too."""


def device_types() -> dict[str, int]:
    """Return the accelerators that are there and how many of each, cpu last (as 0 = any number of ranks)."""
    found: dict[str, int] = {}
    for name in ACCELERATORS:
        backend = getattr(torch, name)
        if backend.is_available():
            found[name] = backend.device_count()
    return {**found, "cpu": 0}


def choose_device(device: str, placement: Placement) -> torch.device:
    """Return this rank's device: the asked type, or the best there is for ``auto``.

    Raises:
        ConfigError: if the type is not there, or there are fewer devices than ranks on this node.
    """
    found = device_types()
    kind = asked(device) or next(iter(found))
    if kind not in found:
        raise ConfigError(f"launcher.device: {kind} is not available here; there is {', '.join(found)}.")
    if kind == "cpu":
        return torch.device("cpu")
    if placement.local_world_size > found[kind]:
        raise ConfigError(
            f"launcher.nproc_per_node: {placement.local_world_size} ranks on this node, but only {found[kind]} {kind} "
            f"device(s). Start {found[kind]} rank(s), or set launcher.device=cpu."
        )
    return torch.device(kind, placement.local_rank)


def use_device(device: torch.device) -> None:
    """Make ``device`` the current one of this process."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)


def device_name(device: torch.device) -> str:
    """Return a device's kind and, of an accelerator, its model."""
    if device.type == "cpu":
        return "cpu"
    return f"{device.type} {torch.get_device_module(device).get_device_name(device)}"


def set_threads(asked: int, local_world_size: int) -> int:
    """Set and return the number of CPU threads of this rank: ``asked``, or its share of the cores when 0."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = asked or max(1, cores // local_world_size)
    torch.set_num_threads(threads)
    return threads


@contextmanager
def process_group(device: torch.device, placement: Placement, timeout_seconds: int) -> Iterator[dist.ProcessGroup]:
    """Open the default group (NCCL/XCCL on accelerators, gloo on a CPU) and close it in every case.

    A single process gets a group of its own, so that nothing below has a special case for it. It asks nobody: a
    MASTER_ADDR that another program left behind would make it wait for an answer.
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
        dist.barrier(group)  # without it gloo's threads can abort a process that leaves before its peers
    finally:
        if dist.is_initialized():  # else it was left at exit, after an error
            dist.destroy_process_group()


RETURNED_BYTES = 16 * 2**20
"""Blocks of at least this size are given back to the kernel at once, where freed memory is not kept."""


def keep_freed_memory(keep: bool) -> None:
    """Let this process keep what it frees, or give large blocks back to the kernel.

    A step frees and takes the same blocks again and again, and spends much of its time in page faults where each comes
    from the kernel; but where blocks of many sizes are kept, a process grows to two or three times what it uses. The
    parameters are those of mallopt(3): M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1). Nothing happens with another C
    library than glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-3, 2**30 if keep else RETURNED_BYTES)
        if keep:
            libc.mallopt(-1, 2**31 - 1)


def host_memory() -> tuple[int, str]:
    """Return the bytes of memory that the processes here may take together, and whose limit that is."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()
    if limit is None or limit >= total:
        return total, "all of the machine"
    return limit, f"the limit of a control group, of {total / 1e9:.1f} GB of the machine"


def memory_of(device: torch.device, local_world_size: int) -> int:
    """Return the bytes of memory that a rank has: its accelerator's, or its share of what processes here may take."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    return host_memory()[0] // local_world_size


def memory_peak(device: torch.device) -> tuple[int, str]:
    """Return this process's peak memory in bytes and what was measured.

    ``max_memory_allocated`` on an accelerator; on a CPU the kernel's high-water mark of resident memory (VmHWM).
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(), "max_memory_allocated"
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024, "VmHWM"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "ru_maxrss"
