"""Rank 0 leads: every order reaches every rank once and in order, and one end is the end of all."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.orders import Tell, led_by_main
from fsdp_qlora.distributed.reduce import all_sum, on_every
from fsdp_qlora.errors import DataError, FsdpQloraError


def _led(ranks: Ranks, ends: str) -> tuple[list[Any], str]:
    done: list[Any] = []

    def work(order: dict[str, Any]) -> None:
        done.append([order["text"], all_sum([order["number"]], ranks)[0]])
        if ends == "all" and order["number"] == 2:
            on_every(_fail, ranks)

    def lead(tell: Tell) -> str:
        for number in range(4):
            if ends == "main" and number == 2:
                _fail()
            order = {"number": number, "text": f"zwölf {number}"}
            tell(order)
            work(order)
        return "over"

    try:
        result = led_by_main(lead, work, ranks)
    except FsdpQloraError as error:
        return done, f"{error.exit_code} {error}"
    return done, str(result)


def _fail() -> None:
    raise DataError("the file is gone")


@pytest.mark.parametrize(("ends", "count", "said"), [("well", 4, "over"), ("main", 2, "gone"), ("all", 3, "gone")])
def test_all_ranks_do_what_rank_0_says_and_end_alike(pool, ends, count, said):
    for num_ranks in (1, 3):
        for rank, (done, result) in enumerate(pool.run(num_ranks, _led, ends)):
            assert done == [[f"zwölf {n}", n * num_ranks] for n in range(count)]
            assert result.endswith(said if said == "gone" or rank == 0 else "None")
            assert said == "over" or result.startswith("2 ")
