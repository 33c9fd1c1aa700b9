"""Run long work once per node while the other ranks poll, outside any collective that could time out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.notes import Board, open_board
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.errors import attempt, raise_alike

_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 5.0
_SAY_SECONDS = 60.0


def once_per_node(work: Callable[[], Any], ranks: Ranks, local_rank: int, waiting: Callable[[str], None]) -> Any:
    """Run ``work`` on local rank 0 of each node; every rank returns the result of its own node.

    Every rank must call it; it returns once all nodes are done.

    Args:
        work: runs once per node; its result must be representable in JSON.
        ranks: all ranks.
        local_rank: this process's rank on its node.
        waiting: receives a progress message for the user about once a minute while this rank waits.

    Raises:
        FsdpQloraError: identically on every rank, with the first failing rank's message; an `OSError` becomes code 74.
    """
    leaders = [rank for rank, local in enumerate(gather_json(local_rank, ranks)) if local == 0]
    mine = max(rank for rank in leaders if rank <= ranks.rank)
    if ranks.size == 1:
        return work()
    board = open_board(ranks)
    if mine == ranks.rank:
        result, verdict = attempt(work)
        board.write(_key(mine), json.dumps(verdict or {"result": result}))
    verdicts = _wait(board, leaders, waiting)
    board.write(f"read-{ranks.rank}", "")
    if ranks.is_main:  # rank 0 may serve the board, so it stays until all have read
        _wait_for_readers(board, ranks.size)
    for rank, verdict in verdicts.items():
        if "code" in verdict:
            raise_alike({**verdict, "message": f"rank {rank}: {verdict['message']}" if rank else verdict["message"]})
    return verdicts[mine]["result"]


def _wait_for_readers(board: Board, count: int) -> None:
    deadline = time.monotonic() + _LEAVE_SECONDS
    missing = set(range(count))
    while missing and time.monotonic() < deadline:
        missing = {rank for rank in missing if board.read(f"read-{rank}") is None}
        if missing:
            time.sleep(_POLL_SECONDS)


def _wait(board: Board, leaders: list[int], waiting: Callable[[str], None]) -> dict[int, dict[str, Any]]:
    """Wait for the leaders and return their verdicts: all of them, or only the failures as soon as there is one."""
    verdicts: dict[int, dict[str, Any]] = {}
    started = said = time.monotonic()
    while len(verdicts) < len(leaders):
        for rank in leaders:
            if rank not in verdicts and (told := board.read(_key(rank))) is not None:
                verdicts[rank] = json.loads(told)
        if any("code" in verdict for verdict in verdicts.values()):
            return {rank: verdict for rank, verdict in verdicts.items() if "code" in verdict}
        if len(verdicts) < len(leaders):
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                missing = ", ".join(str(rank) for rank in leaders if rank not in verdicts)
                waiting(f"waiting for rank {missing}: {said - started:.0f} s")
            time.sleep(_POLL_SECONDS)
    return verdicts


def _key(rank: int) -> str:
    return f"done-{rank}"
