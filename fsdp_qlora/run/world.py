"""The open process group and this process's place in it."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from fsdp_qlora.config.auto import degree
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.memory import PRODUCTS_KEPT, PRODUCTS_KEPT_FOR_EXPERTS, settle_host_memory
from fsdp_qlora.distributed.mesh import Ranks, build_mesh, build_ranks
from fsdp_qlora.distributed.nodes import once_per_node
from fsdp_qlora.distributed.process import (
    Placement,
    choose_device,
    process_group,
    set_threads,
    use_device,
)
from fsdp_qlora.errors import ConfigError

_log = logging.getLogger(__name__)


def require_one_process(what: str, num_processes: int) -> None:
    """Check that an export (``what=``) that one process makes is not started in several.

    Raises:
        ConfigError: if it is.
    """
    if num_processes > 1:
        raise ConfigError(f"what={what}: runs in one process; start it without torchrun.")


@dataclass(frozen=True)
class World:
    """The open process group and this process's place in it."""

    ranks: Ranks
    placement: Placement
    threads: int
    stack: ExitStack

    def resharded(self, shard_degree: int) -> World:
        """Return the same ranks with another number of them sharing one copy of the parameters. A collective."""
        ranks = self.ranks
        mesh = build_mesh(ranks.device, shard_degree, ranks.size // shard_degree, ranks.size)
        return replace(self, ranks=replace(ranks, mesh=mesh))

    def share(self, work: Callable[[], str], doing: str = "preparing the data") -> str:
        """Run ``work`` in one process per node; every rank returns its node's result."""

        def say(line: str) -> None:
            if self.ranks.is_main:
                _log.info("%s: %s", doing, line)

        return once_per_node(work, self.ranks, self.placement.local_rank, say)


def open_world(config: RunConfig) -> World:
    """Choose the device, open the process group and build the mesh, from torchrun's environment or as one process."""
    placement = Placement.from_env()
    device = choose_device(config.launcher.device, placement)
    use_device(device)
    threads = set_threads(config.launcher.threads_per_rank, placement.local_world_size)
    if device.type == "cpu":
        products = PRODUCTS_KEPT_FOR_EXPERTS if config.lora.target_parameters else PRODUCTS_KEPT
        settle_host_memory(config.launcher.keep_freed_memory, products)
    stack = ExitStack()
    group = stack.enter_context(process_group(device, placement, config.launcher.timeout_seconds))
    ranks = build_ranks(group, device, degree(config.fsdp.shard_degree) or 0, config.fsdp.replicate_degree)
    atexit.register(_abandon)
    return World(ranks, placement, threads, stack)


def _abandon() -> None:
    """Destroy the process group at exit, so that a script that ends on an error does not leave the others hanging."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
