"""One pool of 4 gloo processes per pytest session, started once: a launch costs 10 s of imports, a test should not.

``pool.run(n, function, *args)`` calls ``function(ranks, *args)`` on the first ``n`` ranks and returns their results.
The functions live at the top of test modules; they are sent by name.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

POOL_SIZE = 4


class RankError(AssertionError):
    """What a rank raised."""


class Pool:
    """The processes; started at the first use and again after a test that left them stuck."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for rank in range(POOL_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, port, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    def run(
        self, num_ranks: int, function: Callable[..., Any], *args: Any, layout: str = "shard", timeout: float = 480
    ) -> list[Any]:
        """Call ``function(ranks, *args)`` on ``num_ranks`` ranks; raise the first error of any."""
        if not self._processes:
            self._start()
        for pipe in self._pipes[:num_ranks]:
            pipe.send((function.__module__, function.__qualname__, num_ranks, layout, args))
        results: dict[int, Any] = {}
        error, deadline = None, time.monotonic() + timeout
        while len(results) < num_ranks and time.monotonic() < deadline:
            open_pipes = [p for i, p in enumerate(self._pipes[:num_ranks]) if i not in results]
            for ready in wait(open_pipes, timeout=0.2):
                rank = self._pipes.index(ready)  # type: ignore[arg-type]
                ok, value = ready.recv()  # type: ignore[union-attr]
                results[rank] = value
                if not ok and error is None:
                    error = f"rank {rank}: {value}"
                    deadline = min(deadline, time.monotonic() + 3)
        if len(results) < num_ranks:
            self.stop()
            raise RankError(
                error or f"ranks {sorted(set(range(num_ranks)) - results.keys())} gave no answer in {timeout} s"
            )
        if error:
            raise RankError(error)
        return [results[rank] for rank in range(num_ranks)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _work(rank: int, port: int, pipe: Connection) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    from fsdp_qlora.cli.logs import listen
    from fsdp_qlora.cli.quiet import quieten
    from fsdp_qlora.distributed.mesh import Ranks
    from fsdp_qlora.distributed.parent import die_with_parent

    die_with_parent()
    quieten()
    listen()
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    dist.init_process_group("gloo", rank=rank, world_size=POOL_SIZE, timeout=timedelta(seconds=120))
    cpu = torch.device("cpu")
    meshes: dict[tuple[int, str], Ranks] = {}
    for size in range(1, POOL_SIZE + 1):
        group, background = (dist.new_group(list(range(size))) for _ in range(2))
        if rank < size:
            mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",))
            meshes[size, "shard"] = Ranks(mesh, group, background, cpu)
    alone = [dist.new_group([each]) for each in range(POOL_SIZE)]
    for (size, _), ranks in list(meshes.items()):
        groups, numbers = [ranks.group, alone[rank]], torch.arange(size).view(size, 1)
        mesh = DeviceMesh.from_group(groups, "cpu", mesh=numbers, mesh_dim_names=("replicate", "shard"))
        meshes[size, "copies"] = Ranks(mesh, ranks.group, ranks.background, cpu)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    meshes[4, "hybrid"] = Ranks(square, meshes[4, "shard"].group, meshes[4, "shard"].background, cpu)
    pipe.send("ready")
    while True:
        try:
            module, name, size, layout, args = pipe.recv()
        except EOFError:
            return
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send((True, function(meshes[size, layout], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
