"""Be a rank, or start them: what `train`, `evaluate` and `generate` share."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from typing import Any

from fsdp_qlora.config.schema import RunConfig


def on_ranks(verb: str, config: RunConfig, work: Callable[[Any], int]) -> int:
    """Start the ranks that the settings ask for, or, being one of them, open the world and do ``work(world)``."""
    if "RANK" not in os.environ and (num_ranks := ranks_to_start(config)) > 1:
        from fsdp_qlora.cli.launcher import launch

        return launch(verb, config, num_ranks)
    from fsdp_qlora.cli.quiet import quieten

    quieten()
    from fsdp_qlora.api import open_world
    from fsdp_qlora.dist.process import die_with_parent

    if "RANK" in os.environ:
        die_with_parent()
    world = open_world(config)
    code = work(world)
    world.stack.close()
    return code


def ranks_to_start(config: RunConfig) -> int:
    """Return the number of ranks: as set, or one per accelerator of this machine."""
    if config.launcher.nproc_per_node:
        return config.launcher.nproc_per_node
    if config.launcher.device == "cpu" or not (glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dri/render*")):
        return 1
    import torch

    return max(1, torch.accelerator.device_count())
