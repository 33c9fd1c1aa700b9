"""Where the ranks of one machine meet: files in a 0700 folder of our launcher's, so that nothing listens on a port.

Whoever reaches the port of a TCPStore can write into it, and torch's elastic agent unpickles what it reads there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

MEETING_VARIABLE = "FSDP_QLORA_MEETING"
"""Environment variable that names the folder, set by our launcher for its agent and ranks."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""What keeps the ranks' own connections on this machine."""


def meeting_folder() -> Path | None:
    """Return the folder, or None where the ranks were started by something else than our launcher."""
    named = os.environ.get(MEETING_VARIABLE)
    return Path(named) if named else None


def meeting_store(folder: Path, world_size: int) -> Any:
    """Return the store through which the process group is opened; another one after each restart of the ranks."""
    import torch.distributed as dist  # here: the launcher imports no torch

    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return cast(Any, dist).FileStore(str(folder / f"group-{restarts}"), world_size)
