"""The second run: what is done with what lies in the folder (ADR 0003)."""

from __future__ import annotations

from pathlib import Path

from fsdp_qlora.checkpoint.manifest import COMPLETE
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.claim import claim
from fsdp_qlora.run.folder import RunFolder
from tests.build import config_of


def _claim(ranks: Ranks, root: str, resume: str, state: str, change: dict | None = None) -> list:
    """Leave ``state`` behind and claim the folder; return what came of it and what is on disk."""
    folder = RunFolder(root, "r")
    before = config_of("model", run={"output_root": root, "name": "r"})
    if ranks.is_main and state != "nothing":
        folder.create()
        folder.begin(to_dict(before))
        if state in ("checkpoint", "finished"):
            (folder.checkpoints / "step_00000004").mkdir(parents=True)
            (folder.checkpoints / "step_00000004" / COMPLETE).write_text("x")
        if state == "finished":
            folder.write_summary({"steps": 4})
    now = config_of("model", run={"output_root": root, "name": "r"}, checkpoint={"resume": resume}, **(change or {}))
    files = sorted(p.name for p in Path(root).rglob("*.json")) if ranks.is_main else []
    try:
        decision = claim(folder, now, ranks)
        found = [decision.start, decision.note]
    except FsdpQloraError as error:
        found = [error.exit_code, str(error)]
    finally:
        folder.unlock()
    kept = sorted(p.name for p in Path(root).rglob("*.json")) if ranks.is_main else []
    return [*found, sorted(set(files) - set(kept))]


def _case(pool, tmp_path, *args):
    first, second = pool.run(2, _claim, str(tmp_path), *args)
    assert first[:2] == second[:2]
    return first


def test_a_new_folder_starts(pool, tmp_path):
    for number, resume in enumerate(("auto", "never")):
        assert _case(pool, tmp_path / str(number), resume, "nothing") == [True, "", []]


def test_a_start_without_checkpoint_starts_anew(pool, tmp_path):
    for number, resume in enumerate(("auto", "never")):
        assert _case(pool, tmp_path / str(number), resume, "started")[0] is True


def test_an_unfinished_run(pool, tmp_path):
    assert _case(pool, tmp_path / "a", "auto", "checkpoint")[0] is True
    code, message, _ = _case(pool, tmp_path / "b", "never", "checkpoint")
    assert code == 2 and "checkpoint.resume=auto" in message and "run.name" in message


def test_a_finished_run(pool, tmp_path):
    start, note, _ = _case(pool, tmp_path / "a", "auto", "finished")
    assert start is False and "nothing to do" in note
    start, note, lost = _case(pool, tmp_path / "b", "never", "finished")
    assert start is True and str(tmp_path / "b" / "r.1") in note and not lost
    assert (tmp_path / "b" / "r.1" / "summary.json").is_file()
    more = {"train": {"max_steps": 9, "global_batch_size": 6, "micro_batch_size": 2}}
    assert _case(pool, tmp_path / "c", "auto", "finished", more)[0] is True


def test_changed_settings_are_refused_field_by_field_and_nothing_is_lost(pool, tmp_path):
    change = {"lora": {"r": 8, "alpha": 8}, "quant": {"name": "fp4"}}
    for number, state in enumerate(("checkpoint", "finished")):
        root = tmp_path / str(number)
        code, message, lost = _case(pool, root, "auto", state, change)
        assert code == 2 and "lora.r: 4 in the checkpoint, 8 now" in message
        assert "quant.name: 'nf4' in the checkpoint, 'fp4' now" in message
        assert not lost
        assert (root / "r" / "summary.json").is_file() == (state == "finished")
    free = {"train": {"max_steps": 4, "log_every": 2, "global_batch_size": 6, "micro_batch_size": 2}}
    assert _case(pool, tmp_path / "free", "auto", "finished", free)[0] is False


def _different(ranks: Ranks, root: str) -> str:
    config = config_of("model", run={"output_root": root, "name": "r", "seed": ranks.rank})
    try:
        claim(RunFolder(root, "r"), config, ranks)
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return "started"


def test_ranks_that_were_started_apart_are_refused_before_anything_is_touched(pool, tmp_path):
    answers = pool.run(2, _different, str(tmp_path / "x"))
    assert all(a.startswith("2 rank 1 was started with different settings") for a in answers)
    assert not (tmp_path / "x").exists()
