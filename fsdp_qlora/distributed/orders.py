"""Rank 0 leads, the others follow: for work that only rank 0 knows of, such as what a user types.

The others wait for the next order by polling a board, outside any collective that could time out; rank 0 may take hours
to give it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.notes import Board, open_board
from fsdp_qlora.distributed.reduce import from_main
from fsdp_qlora.errors import FsdpQloraError, attempt, raise_alike

_T = TypeVar("_T")
_POLL_SECONDS = 0.05
_LAST = "last"

Tell = Callable[[Any], None]
"""Gives the other ranks an order: anything representable in JSON. Rank 0 must then do the same work as they do."""


def led_by_main(lead: Callable[[Tell], _T], follow: Callable[[Any], object], ranks: Ranks) -> _T | None:
    """Run ``lead`` on rank 0 and ``follow`` on the others, once for each order; return rank 0's result, or None.

    A collective: every rank must call it.

    Raises:
        FsdpQloraError: identically on every rank, with rank 0's message and exit code; an `OSError` becomes code 74.
    """
    if ranks.size == 1:
        return lead(lambda _: None)
    board = open_board(ranks)
    if not ranks.is_main:
        _follow(board, follow, ranks)
        return None
    given = 0
    shared: list[FsdpQloraError] = []

    def tell(order: Any) -> None:
        nonlocal given
        board.write(f"order-{given}", "")
        from_main(json.dumps(order).encode(), ranks)
        given += 1

    def work() -> _T:
        try:
            return lead(lambda order: tell({"order": order}))
        except FsdpQloraError as error:
            shared.extend([error] if error.alike else [])
            raise

    result, verdict = attempt(work)
    if shared:  # the others have raised it, too, and wait for nothing
        raise shared[0]
    tell({_LAST: verdict})
    raise_alike(verdict)
    return result


def _follow(board: Board, follow: Callable[[Any], object], ranks: Ranks) -> None:
    taken = 0
    while True:
        while board.read(f"order-{taken}") is None:
            time.sleep(_POLL_SECONDS)
        taken += 1
        told = json.loads(from_main(b"", ranks))
        if _LAST in told:
            raise_alike(told[_LAST])
            return
        follow(told["order"])
