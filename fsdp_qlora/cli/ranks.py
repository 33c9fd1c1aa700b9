"""Being a rank: what `train`, `evaluate` and `generate` share."""

from __future__ import annotations

from collections.abc import Callable

from fsdp_qlora.api import World, open_world
from fsdp_qlora.config.schema import RunConfig


def on_ranks(config: RunConfig, work: Callable[[World], int]) -> int:
    """Be a rank (or the only process): open the world, do ``work(world)``, close it."""
    world = open_world(config)
    code = work(world)
    world.stack.close()
    return code
