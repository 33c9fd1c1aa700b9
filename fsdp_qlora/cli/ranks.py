"""Being a rank: what `train`, `evaluate` and `generate` share."""

from __future__ import annotations

import os
from collections.abc import Callable

from fsdp_qlora.api import World, open_world
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.dist.process import die_with_parent


def on_ranks(config: RunConfig, work: Callable[[World], int]) -> int:
    """Be a rank (or the only process): open the world, do ``work(world)``, close it."""
    if "RANK" in os.environ:
        die_with_parent()
    world = open_world(config)
    code = work(world)
    world.stack.close()
    return code
