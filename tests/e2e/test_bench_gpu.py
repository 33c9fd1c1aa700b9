"""`make bench-gpu` dry-runs every part at small size on a CPU; stopping after any part leaves a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import HEADER, part_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device: make bench-gpu runs in earnest"),
]
FAILS_ON_A_CPU = {"TRL, FSDP2", "TRL, FSDP2, full checkpointing", "Unsloth", "ours, kernels=liger, 2 rows"}


def bench(out: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=590, check=False)


def lines(out: Path) -> list[dict[str, str]]:
    text = (out / "gpu.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text if line.startswith("| ")]
    return [dict(zip(HEADER, row, strict=True)) for row in cells[2:]]


def rows(out: Path, part: str) -> dict[str, dict]:
    return {row["way"]: row for row in json.loads(part_file(out, part).read_text())["rows"]}


def require_dry(out: Path, part: str) -> None:
    """Check that the part has a line for each row, marked, with no figure that only a device has."""
    mine = [line for line in lines(out) if line["part"] == part]
    assert len(mine) == len(rows(out, part)) > 0
    for line in mine:
        assert line["remarks"].startswith("dry run on a CPU")
        for key in ("share of peak, 4 N", "allocated, GB", "reserved, GB"):
            assert line[key] == "-"


def test_without_a_device_there_is_one_message_and_no_table(cli_env, tmp_path):
    done = bench(tmp_path, cli_env, "llama8b")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "error: torch finds no accelerator here; --small --out FOLDER is a dry run on the CPU"
    )
    assert list(tmp_path.iterdir()) == []


def test_two_parts_at_small_size(cli_env, tmp_path):
    arguments = ["tests", "llama8b", "--small", "--rounds", "2", "--steps", "1", "--ways", "digests", "ours, 2 rows"]
    done = bench(tmp_path, cli_env, *arguments)
    assert done.returncode == 0, done.stderr
    for part in ("tests", "llama8b"):
        require_dry(tmp_path, part)
    assert all(digest["differing"] == 0 for digest in rows(tmp_path, "tests")["digests"]["digests"])
    ours = rows(tmp_path, "llama8b")["ours, 2 rows"]
    assert "failed" not in ours
    assert ours["tokens_per_second"] > 0 and ours["rounds"] == 2 and ours["planned"] > 0 and ours["load_seconds"] > 0
    assert ours["read"] >= 2 * ours["weights_of_token"]
    assert "Not run yet: memory, peers, moe, dense32b, mistral7b, cards." in (tmp_path / "gpu.md").read_text()


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
def test_every_part_at_small_size(part, cli_env, tmp_path):
    done = bench(tmp_path, cli_env, part, "--small", "--rounds", "1", "--steps", "1")
    assert done.returncode == 0, done.stderr
    require_dry(tmp_path, part)
    failed = {way: row["failed"] for way, row in rows(tmp_path, part).items() if "failed" in row}
    assert all(way in FAILS_ON_A_CPU or why == "not installed" for way, why in failed.items()), failed
    measured = [row for row in rows(tmp_path, part).values() if "tokens_per_second" in row]
    assert measured or part == "tests"
    if part == "tests":
        assert rows(tmp_path, part)["tests/gpu"]["counts"]["passed"] >= 3
    if part == "memory":
        assert all(row["simulated"] > 0 for row in rows(tmp_path, part).values())
    if part == "cards":
        assert rows(tmp_path, part)["ours, sharded"]["gather_checked"] > 0


@pytest.mark.full
def test_a_part_stops_at_its_limit_and_keeps_its_rows(cli_env, tmp_path):
    """The first way is ended in the middle of its rounds, the others are not started."""
    done = bench(tmp_path, cli_env, "llama8b", "--small", "--rounds", "1000000", "--limit", "45")
    assert done.returncode == 0, done.stderr
    first, *others = rows(tmp_path, "llama8b").values()
    assert first["tokens_per_second"] > 0 and first["failed"].endswith("of 1000000 rounds, time was up")
    assert {row["failed"] for row in others} == {"not started: the part's time was up"}
    require_dry(tmp_path, "llama8b")
