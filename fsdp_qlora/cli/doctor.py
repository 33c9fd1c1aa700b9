"""`doctor`: shows devices, versions and memory, and what would prevent a run."""

from __future__ import annotations

import os
import shutil
import socket

import torch

from fsdp_qlora.cli.tables import print_table
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.memory import host_memory
from fsdp_qlora.distributed.process import Placement, choose_device, device_types
from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.backend import bitsandbytes_backend
from fsdp_qlora.run.folder import versions
from fsdp_qlora.track.console import megabytes


def run(config: RunConfig) -> int:
    """Print devices, versions, memory and the launcher's environment; return the exit code."""
    placement = Placement.from_env()
    rows = [(name, value) for name, value in versions().items()]
    rows.append(("quantization", _quantization()))
    rows += [(f"{kind} devices", str(count) if count else "yes") for kind, count in device_types().items()]
    rows.append(("device of a run", str(choose_device(config.launcher.device, placement))))
    rows.append(("cores", str(len(os.sched_getaffinity(0)))))
    memory, whose = host_memory()
    rows.append(("memory", f"{megabytes(memory)} ({whose})"))
    rows.append(("host", f"{socket.gethostname()}, rank {placement.rank} of {placement.world_size}"))
    rows.append(("rendezvous", os.environ.get("MASTER_ADDR", "none (single process)")))
    rows.append(("torch's threads", str(torch.get_num_threads())))
    rows.append(("free disk here", megabytes(shutil.disk_usage(".").free)))
    print_table("doctor", rows)
    return 0


def _quantization() -> str:
    try:
        return bitsandbytes_backend(torch.device(next(iter(device_types()))))
    except PlanError as error:
        return str(error)
