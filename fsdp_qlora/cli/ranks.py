"""Runs work as one rank, for `train`, `evaluate` and `generate`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.signals import STOP_SIGNALS, give_back_signals, take_signals
from fsdp_qlora.distributed.torchrun import is_rank
from fsdp_qlora.run.world import World, open_world


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let signals end the wait for the other ranks: it is in C code, during which Python runs no handlers."""
    before = take_signals(STOP_SIGNALS, signal.SIG_DFL) if is_rank(os.environ) else {}
    try:
        yield
    finally:
        give_back_signals(before)


def on_ranks(config: RunConfig, work: Callable[[World], int]) -> int:
    """Open the world as a rank (or the only process), run ``work(world)``, and close it; return the exit code."""
    with _interruptible():
        world = open_world(config)
    code = work(world)
    world.stack.close()
    return code
