"""`debug=profile` on ranks: the files, the table that adds up, and nothing else changed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.profile.phases import PHASES, divide_steps
from fsdp_qlora.profile.trace import read_trace
from tests.build import build, essence, metrics, run_fit


def _groups(rows: Path, steps: int, **more) -> dict:
    return {
        "data": {"train": str(rows), "max_length": 64},
        "train": {"max_steps": steps, "global_batch_size": 6, "micro_batch_size": 2, **more},
        "schedule": {"name": "constant"},
    }


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_two_ranks_tell_where_their_steps_went(pool, tiny_model, chat_rows, tmp_path, checkpointing):
    groups = _groups(chat_rows, 6, activation_checkpointing=checkpointing)
    plain = {**groups, "train": {**groups["train"], "max_steps": 2}}
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "run", plain)
    assert not any("roofline_share" in line or "mfu" in line for line in metrics(tmp_path / "run"))

    profiled = {**groups, "debug": {"name": "profile", "warmup_steps": 1, "record_steps": 2}}
    summary = pool.run(2, run_fit, str(tiny_model), str(tmp_path), "run", profiled)[0]["summary"]  # a resume, too

    folder = tmp_path / "run/profile"
    assert sorted(p.name for p in folder.iterdir()) == ["phases.json", "rank0.json.gz", "rank1.json.gz"]
    written = json.loads((folder / "phases.json").read_text())
    lines = {line["step"]: line for line in metrics(tmp_path / "run") if "loss" in line}
    for number, rank in enumerate(written["ranks"]):
        assert rank["rank"] == number and rank["steps"] == [4, 5] and list(rank["phases"]) == list(PHASES)
        assert sum(rank["phases"].values()) == pytest.approx(rank["step_seconds"], rel=1e-9)
        assert sum(rank["waiting"].values()) == pytest.approx(rank["phases"]["waiting"], rel=1e-9)
        # the trace's clock, the profiler's own and the meter's measured the same steps
        assert rank["step_seconds"] == pytest.approx(rank["measured_step_seconds"], rel=0.02, abs=0.02)
        for phase in ("gather", "dequantize", "gemm", "attention", "elementwise", "head", "optimizer", "waiting"):
            assert rank["phases"][phase] > 0, phase
        assert 0 <= rank["waiting"]["in_collectives"] <= rank["collectives_under_way"] < rank["step_seconds"]
        assert rank["collectives_under_way"] > 0
        json.loads(gzip.decompress((folder / f"rank{number}.json.gz").read_bytes()))
        for step in divide_steps(read_trace(folder / f"rank{number}.json.gz")):
            assert sum(step.phases.values()) == step.total
    metered = sum(lines[step]["step_seconds"] for step in (4, 5)) / 2
    assert written["ranks"][0]["step_seconds"] == pytest.approx(metered, rel=0.05, abs=0.03)

    shown = summary["profile"]
    assert shown["ranks"][0] == written["ranks"][0] and shown["slowest_rank"] in (0, 1)
    assert len(shown["ranks"]) == (1 if shown["slowest_rank"] == 0 else 2)
    assert written["matrix_products_alone"]["teraflops"] > 0
    assert all(0 < lines[step]["roofline_share"] < 1 for step in (3, 4, 5, 6))

    # it looks on: the numbers are those of a run without it, resumed at the same step
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "other", plain)
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "other", groups)
    assert essence(metrics(tmp_path / "run")) == essence(metrics(tmp_path / "other"))


def _fit_twice(ranks: Ranks, model: str, root: str, groups: dict) -> list[bool]:
    from fsdp_qlora.run.fit import fit

    found = []
    for name, steps in (("short", 3), ("longer", 4)):
        train = {**groups["train"], "max_steps": steps}
        debug = {"name": "profile", "warmup_steps": 2, "record_steps": 5}
        run = {"output_root": root, "name": name}
        found.append(
            "profile" in fit(build(ranks, model, **{**groups, "train": train, "debug": debug, "run": run})).summary
        )
    return found


@pytest.mark.full
def test_a_run_that_ends_while_recording_tells_of_what_it_has(pool, tiny_model, chat_rows, tmp_path):
    assert pool.run(1, _fit_twice, str(tiny_model), str(tmp_path), _groups(chat_rows, 4)) == [[True, True]]
    for name, steps in (("short", [3]), ("longer", [3, 4])):
        (rank,) = json.loads((tmp_path / name / "profile/phases.json").read_text())["ranks"]
        assert rank["steps"] == steps and sum(rank["phases"].values()) == pytest.approx(rank["step_seconds"])
