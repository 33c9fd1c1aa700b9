"""Memory of a rank: what it may use, what it uses, and how little of the freed memory it keeps."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fsdp_qlora.distributed.cgroup import memory_limit

KEPT_BYTES, SPARED_BYTES, RETURNED_BYTES = 2**30, 32 * 2**20, 16 * 2**20
"""Blocks of at least this size come from the kernel and return to it: if freed memory is kept, if it is kept but for a
while spared, and if it is not kept."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of mallopt(3)."""
_PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRODUCTS_KEPT, PRODUCTS_KEPT_FOR_EXPERTS = 64, 128
"""oneDNN compiles a matrix product for each number of tokens. It and torch each keep the last 1,024 of them, at some
0.5 MB apiece. A micro-batch needs about 40, and the next one usually has another number of tokens. Adapters on experts
need some 50 more, for the few numbers of rows that `quant/one_by_one.py` lets experts have."""


def settle_host_memory(keep_freed: bool, products: int = PRODUCTS_KEPT) -> None:
    """Set how this process, a rank on a CPU, keeps memory; call it before the first matrix product.

    A step allocates and frees the same blocks over and over. If each comes from the kernel, it spends much of its time
    in page faults (``keep_freed`` false: 0.8 times the speed for a model of 1.1 billion weights); not with C libraries
    other than glibc. ``products`` is how many compiled matrix products are kept.
    """
    for name in _PRODUCT_CACHES:
        os.environ.setdefault(name, str(products))
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, KEPT_BYTES if keep_freed else RETURNED_BYTES)
        if keep_freed:
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def spared_memory() -> Iterator[None]:
    """Keep no large block meanwhile, and nothing that was freed afterwards, in a process that keeps freed memory.

    Around evaluation and generation, whose blocks a step does not need. While a heap keeps very large ones, a small one
    may stay between them, and the next large one extends the heap (SmolLM2-135M: by 45 MB for each token generated).
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, SPARED_BYTES)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
        return_freed_memory()


def return_freed_memory() -> None:
    """Return to the kernel what this process has freed, where a phase ends whose blocks the next one does not need."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def host_memory() -> tuple[int, str]:
    """Return how many bytes of memory the processes here may use in total, and what sets that limit."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()
    if limit is None or limit >= total:
        return total, "the whole machine"
    return limit, f"a cgroup limit; the machine has {total / 1e9:.1f} GB"


def memory_of(device: torch.device, local_world_size: int) -> int:
    """Return the bytes that a rank may use: what is free on its accelerator, or its share of the host's memory.

    What this process's allocator holds without using it is free as well.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    return host_memory()[0] // local_world_size


def memory_peak(device: torch.device) -> tuple[int, str]:
    """Return this process's peak memory in bytes and the name of the metric.

    On an accelerator it is ``max_memory_allocated``; on CPU, the kernel's high-water mark of resident memory, VmHWM
    (``ru_maxrss`` if the kernel does not report it).
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(), "max_memory_allocated"
    if (peak := _of_status("VmHWM")) is not None:
        return peak, "VmHWM"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "ru_maxrss"


def resident_bytes() -> int:
    """Return this process's resident memory in bytes; 0 where the kernel does not report it."""
    return _of_status("VmRSS") or 0


def _of_status(name: str) -> int | None:
    """Return a figure of /proc/self/status in bytes, or None if it is not there."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
