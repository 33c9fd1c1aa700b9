"""Rendezvous of the ranks on one machine: files in a 0700 folder made by our launcher, so no port is opened.

Anyone who can reach the port of a TCPStore can write to it, and torch's elastic agent unpickles what it reads there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

MEETING_VARIABLE = "FSDP_QLORA_MEETING"
"""Environment variable with the folder's path, set by our launcher for its agent and ranks."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment variables that keep the ranks' own connections on the loopback interface."""


def meeting_folder() -> Path | None:
    """Return the folder, or None if the ranks were not started by our launcher."""
    named = os.environ.get(MEETING_VARIABLE)
    return Path(named) if named else None


def meeting_store(folder: Path, world_size: int) -> Any:
    """Return the store for initialising the process group; each restart of the ranks uses a new one."""
    import torch.distributed as dist  # imported here because the launcher must not import torch

    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return cast(Any, dist).FileStore(str(folder / f"group-{restarts}"), world_size)
