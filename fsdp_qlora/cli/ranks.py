"""Being a rank: what `train`, `evaluate` and `generate` share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsdp_qlora.api import World, open_world
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.dist.signals import give_back_signals, take_signals


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the wait for the other ranks, which is C code in which Python runs no handler."""
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = take_signals((signal.SIGINT,), signal.SIG_DFL) if default else {}
    try:
        yield
    finally:
        give_back_signals(before)


def on_ranks(config: RunConfig, work: Callable[[World], int]) -> int:
    """Be a rank (or the only process): open the world, do ``work(world)``, close it."""
    with _interruptible():
        world = open_world(config)
    code = work(world)
    world.stack.close()
    return code
