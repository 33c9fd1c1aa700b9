"""What `plan` prints: each line is true and can be read."""

from __future__ import annotations

import pytest

from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.cli.plan import run
from fsdp_qlora.distributed.mesh import degrees
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.track.console import duration, megabytes

RANKS = {
    1: ("1", "one after the other"),
    2: ("2; all share one copy of the base", "8 on each rank"),
    3: ("3; all share one copy of the base", "6 on each rank, 2 fewer on the last ranks together"),
    16: (
        "16; all share one copy of the base; assumed to be on one node (launcher.nproc_per_node=8 plans for nodes of 8)",
        "1 on each rank",
    ),
    32: (
        "32; all share one copy of the base; assumed to be on one node (launcher.nproc_per_node=8 plans for nodes of 8)",
        "on 16 of the 32 ranks: the others have nothing to do",
    ),
}
"""Ranks -> their line, and how 16 micro-batches are dealt."""


def _lines(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, str]:
    assert run(compose_config("plan", ["model.name=Qwen/Qwen3-0.6B", "plan.gpu=24GiB", *overrides])) == 0
    rows: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("│") and len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 2:
            name = cells[0] or name
            rows[name] = f"{rows.get(name, '')} {cells[1]}".strip()
    return rows


@pytest.mark.full
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_and_batches_are_described(capsys: pytest.CaptureFixture[str], ranks: int) -> None:
    rows = _lines(capsys, f"plan.world_size={ranks}")
    shared, dealt = RANKS[ranks]
    assert rows["ranks"] == shared and f" tokens, {dealt}; " in rows["batch"]
    assert rows["gathered per rank"] == "nothing" if ranks == 1 else rows["gathered per rank"].endswith(" per step")
    assert rows["host memory per rank"].endswith(" for loading") and ":" not in rows["host memory per rank"]
    assert not any(value.startswith(("0 ", "0.0 ")) for value in rows.values())


@pytest.mark.full
def test_copies_and_nodes_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _lines(capsys, "plan.world_size=3", "fsdp.shard_degree=1", "fsdp.replicate_degree=3")
    assert rows["ranks"] == "3; each keeps a whole copy of the base" and rows["gathered per rank"] == "nothing"
    rows = _lines(capsys, "plan.world_size=16", "fsdp.replicate_degree=2", "launcher.nproc_per_node=8")
    assert rows["ranks"] == "16 on 2 nodes of 8; 2 copies of the base, each shared by 8 ranks"


@pytest.mark.full
def test_short_steps_and_activations_that_stay_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _lines(capsys, "plan.device=h100", "data.max_length=64", "fsdp.offload=activations", "plan.world_size=1")
    assert rows["step"].partition(",")[0].endswith(" ms") and " 0.0" not in rows["micro-batch on h100"]
    assert rows["stays on the device"].endswith("of what layers keep for backward: tensors below 1 MiB")


def test_numbers_are_short() -> None:
    assert [megabytes(count) for count in (0, 512, 2e5, 3.21e8, 4.5e9)] == [
        "0 MB",
        "0.5 kB",
        "0.2 MB",
        "321.0 MB",
        "4.50 GB",
    ]
    seconds = (0.00036, 0.0057, 0.035, 0.95, 12.33, 123.4)
    assert [duration(each) for each in seconds] == ["0.36 ms", "5.7 ms", "35 ms", "0.95 s", "12.3 s", "123 s"]


def test_degrees_that_do_not_multiply_to_the_ranks_name_a_way_out() -> None:
    with pytest.raises(
        ConfigError, match=r"fsdp\.shard_degree: 1 x .* set fsdp\.replicate_degree=3 for as many copies, or"
    ):
        degrees(1, 1, 3)
    with pytest.raises(ConfigError, match=r"^fsdp\.shard_degree: 2 x .*, 3; set fsdp\.shard_degree=0 to derive it\.$"):
        degrees(2, 1, 3)
