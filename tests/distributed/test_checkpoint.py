"""A checkpoint is whole or it is none; it holds no pickle and follows no path."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from fsdp_qlora.checkpoint.checkpointer import Checkpointer, Snapshot
from fsdp_qlora.checkpoint.manifest import COMPLETE, MANIFEST
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.checkpoint.retention import Retention
from fsdp_qlora.config.auto import Resume
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError


def _tensors(ranks: Ranks, value: float) -> dict:
    shapes = {"model.a": (7, 3), "model.b": (1, 5), "optim.a.exp_avg": (7, 3)}
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + number + value
        start, stop = (min(i * -(-shape[0] // ranks.size), shape[0]) for i in (ranks.rank, ranks.rank + 1))
        found[name] = DTensor.from_local(
            whole[start:stop].clone(), ranks.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return found


def _save(ranks: Ranks, folder: str, steps: list[int], keep_last: int) -> list[str]:
    checkpointer = Checkpointer(Path(folder), ranks, Retention(keep_last))
    for step in steps:
        checkpointer.save(Snapshot(step, {"step": step}, {"seed": 1}, {}), partial(_tensors, ranks, step))
    checkpointer.close()
    return [p.name for p in complete_checkpoints(Path(folder))]


def _load(ranks: Ranks, folder: str, resume: str, identity: dict) -> tuple:
    checkpointer = Checkpointer(Path(folder), ranks)
    try:
        found = checkpointer.find(Resume.of(resume), identity)
    except FsdpQloraError as error:
        return error.exit_code, str(error)
    if found is None:
        return 0, "none"
    tensors = _tensors(ranks, -1000)
    checkpointer.load(found, tensors)
    step = found.manifest.step
    expected = {n: t.full_tensor() for n, t in _tensors(ranks, step).items()}
    assert all(torch.equal(t.full_tensor(), expected[n]) for n, t in tensors.items())
    return 0, step


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("loaded_by", [1, 2, 3, 4])
def test_reshards(pool, tmp_path, saved_by, loaded_by):
    assert pool.run(saved_by, _save, str(tmp_path), [5], 2)[0] == ["step_00000005"]
    assert pool.run(loaded_by, _load, str(tmp_path), "auto", {"seed": 1}) == [(0, 5)] * loaded_by
    names = {p.name for p in (tmp_path / "step_00000005").iterdir()}
    assert names >= {MANIFEST, COMPLETE} and all(n.endswith((".safetensors", ".json")) for n in names - {COMPLETE})


def test_keeps_the_newest_and_leaves_strangers_alone(pool, tmp_path):
    (tmp_path / "step_00000001").mkdir()  # not ours to judge: no COMPLETE file
    (tmp_path / "notes").mkdir()
    assert pool.run(2, _save, str(tmp_path), [2, 4, 6], 2)[0] == ["step_00000004", "step_00000006"]
    assert (tmp_path / "step_00000001").is_dir() and (tmp_path / "notes").is_dir()


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))


DAMAGE = {
    "flipped bit in COMPLETE": lambda f: _flip(f / COMPLETE),
    "optimizer part missing": lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
    "manifest missing": lambda f: (f / MANIFEST).unlink(),
    "manifest truncated": lambda f: os.truncate(f / MANIFEST, 200),
    "flipped bit": lambda f: _flip(sorted(f.glob("*.safetensors"))[0]),
    "truncated": lambda f: os.truncate(sorted(f.glob("*.safetensors"))[-1], 40),
    "missing file": lambda f: sorted(f.glob("*.safetensors"))[0].unlink(),
    "extra file": lambda f: (f / "more.safetensors").write_bytes(b"x"),
    "manifest changed": lambda f: _flip(f / MANIFEST),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(pool, tmp_path, kind):
    pool.run(2, _save, str(tmp_path), [2, 4], 2)
    DAMAGE[kind](tmp_path / "step_00000004")
    assert pool.run(2, _load, str(tmp_path), "auto", {"seed": 1}) == [(0, 2)] * 2
    for code, message in pool.run(2, _load, str(tmp_path), str(tmp_path / "step_00000004"), {"seed": 1}):
        assert code == 65 and "step_00000004" in message


def test_incomplete_ones_are_not_candidates(pool, tmp_path):
    pool.run(2, _save, str(tmp_path), [2, 4], 2)
    (tmp_path / "step_00000004" / COMPLETE).unlink()
    shutil.copytree(tmp_path / "step_00000002", tmp_path / ".saving_step_00000009")
    assert pool.run(1, _load, str(tmp_path), "auto", {"seed": 1}) == [(0, 2)]
    assert pool.run(1, _load, str(tmp_path / "nowhere"), "auto", {"seed": 1}) == [(0, "none")]
    assert pool.run(1, _load, str(tmp_path), str(tmp_path / "nowhere"), {"seed": 1})[0][0] == 65


def test_other_settings_are_refused_field_by_field(pool, tmp_path):
    pool.run(2, _save, str(tmp_path), [2], 2)
    code, message = pool.run(2, _load, str(tmp_path), "auto", {"seed": 2, "lora.r": 8})[1]
    assert code == 2 and "seed: 1 in the checkpoint, 2 now" in message and "lora.r: None in the checkpoint" in message


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "link.safetensors"])
def test_paths_out_of_the_folder_are_refused(pool, tmp_path, name):
    pool.run(1, _save, str(tmp_path), [2], 2)
    folder = tmp_path / "step_00000002"
    manifest = json.loads((folder / MANIFEST).read_text())
    if name.startswith("link"):
        (folder / name).symlink_to("/etc/passwd")
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    text = json.dumps(manifest)
    (folder / MANIFEST).write_text(text)
    (folder / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest())
    assert pool.run(1, _load, str(tmp_path), "auto", {"seed": 1})[0][0] == 77


class _Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def _vouch(folder: Path, manifest: dict) -> None:
    """Write the manifest with the digests of what lies there, and COMPLETE for it: what a forger would do."""
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest)
    (folder / MANIFEST).write_text(text)
    (folder / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest())


def _as_pickle(folder: Path, name: str, mark: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save({"x": _Payload(mark)}, buffer)
    (folder / name).write_bytes(buffer.getvalue())


def _huge(manifest: dict) -> None:
    manifest["tensors"]["model.a"] = [10**12, 10**6]


def _outside(manifest: dict) -> None:
    manifest["tensors"]["model.a"] = [3, 3]


FORGED = ["shard-00001-model-00001-of-00001.safetensors", "adapter/adapter_model.safetensors", ".metadata", "more.pt",
          "adapter/tokenizer.json", "adapter/training_args.bin", "huge", "outside", MANIFEST]  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_what_no_save_of_ours_can_have_made_is_refused_and_nothing_is_executed(pool, tmp_path, kind):
    pool.run(1, _save, str(tmp_path), [2], 2)
    folder, mark = tmp_path / "step_00000002", tmp_path / "executed"
    manifest = json.loads((folder / MANIFEST).read_text())
    if kind in ("huge", "outside"):
        _huge(manifest) if kind == "huge" else _outside(manifest)
        _vouch(folder, manifest)
    elif kind == MANIFEST:
        _as_pickle(folder, MANIFEST, mark)
        (folder / COMPLETE).write_text(hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest())
    else:
        _as_pickle(folder, kind, mark)
        manifest["files"][kind] = {}
        _vouch(folder, manifest)
    for resume in ("auto", str(folder)):
        ((code, message),) = pool.run(1, _load, str(tmp_path), resume, {"seed": 1})
        assert code == 77, message
    assert not mark.exists()


def _keep(ranks: Ranks, folder: str, losses: list[float], retention: Retention) -> list[int]:
    checkpointer = Checkpointer(Path(folder), ranks, retention)
    for step, loss in enumerate(losses, start=1):
        progress = {"step": step, "last_eval_loss": loss, "evaluated_step": step}
        checkpointer.save(Snapshot(step, progress, {}, {}), partial(_tensors, ranks, step))
    checkpointer.close()
    return [int(f.name[5:]) for f in complete_checkpoints(Path(folder))]


def test_what_is_kept(pool, tmp_path):
    losses = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    for number, (retention, kept) in enumerate(
        [
            (Retention(1), [7]),
            (Retention(2, keep_every=3), [3, 6, 7]),
            (Retention(1, keep_best=2), [2, 3, 7]),
            (Retention(0), [7]),  # the newest good one always stays
        ]
    ):
        assert pool.run(2, _keep, str(tmp_path / str(number)), losses, retention)[0] == kept


def _again(ranks: Ranks, folder: str) -> list:
    """Fail once, then be able to write: the run goes on; and a save waits for the one before."""
    said: list[str] = []
    checkpointer = Checkpointer(Path(folder), ranks, say=said.append)
    blocker = Path(folder)
    checkpointer.save(Snapshot(1, {}, {}, {}), partial(_tensors, ranks, 1))
    checkpointer.settle()
    gave_up_after_one = checkpointer.gave_up
    torch.distributed.barrier(ranks.group)
    if ranks.is_main:
        blocker.unlink()
    torch.distributed.barrier(ranks.group)
    for step in (2, 3, 4):
        checkpointer.save(Snapshot(step, {}, {}, {}), partial(_tensors, ranks, step))
    checkpointer.finish(Snapshot(4, {}, {}, {}), partial(_tensors, ranks, 4))
    return [gave_up_after_one, checkpointer.gave_up, said, [f.name[-1] for f in complete_checkpoints(blocker)]]


def test_one_failed_save_is_told_and_tried_again(pool, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    first, second = pool.run(2, _again, str(tmp_path / "checkpoints"))
    assert first[:2] == second[:2] == [False, False]
    assert len(first[2]) == 1 and "checkpoint of step 1 FAILED" in first[2][0] and second[2] == []
    assert first[3] == ["3", "4"]


def _fail(ranks: Ranks, folder: str, place: str, number: int) -> list:
    """Save with a function on rank 0 that raises an operating-system error; return what is said and counted."""
    said: list[str] = []
    checkpointer = Checkpointer(Path(folder), ranks, say=said.append)
    with mock.patch(f"fsdp_qlora.checkpoint.{place}", side_effect=OSError(number, os.strerror(number), folder)):
        try:
            checkpointer.finish(Snapshot(1, {}, {}, {}), partial(_tensors, ranks, 1))
        except FsdpQloraError as error:
            said.append(str(error))
    checkpointer.close()
    return [said, checkpointer._failures]


def test_old_checkpoints_that_stay_are_no_failed_save(pool, tmp_path):
    """And rank 0 counts no failure that the other ranks do not count."""
    first, second = pool.run(2, _fail, str(tmp_path), "checkpointer.superfluous", errno.EIO)
    assert first[1] == second[1] == 0 and second[0] == []
    assert len(first[0]) == 1 and "keep_last: an old checkpoint cannot be deleted" in first[0][0]
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_the_last_failure_is_told_in_sentences_and_with_its_own_remedy(pool, tmp_path, number):
    said = pool.run(2, _fail, str(tmp_path), "write.make_fresh", number)[1][0][-1]
    remedy = " (free up space)" if number == errno.ENOSPC else ""
    assert f"'{tmp_path}'{remedy}. The run stops. Older checkpoints are intact." in said
    assert ("space" in said.replace("No space left", "")) is bool(remedy)


def test_what_a_kill_left_between_two_moves_is_undone(pool, tmp_path):
    pool.run(2, _save, str(tmp_path), [2, 4], 2)
    (tmp_path / "step_00000004").rename(tmp_path / ".replaced_step_00000004")  # the new one never came
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / ".removing_step_00000001").mkdir()
    (tmp_path / ".saving_step_00000006").mkdir()
    assert pool.run(2, _load, str(tmp_path), "auto", {"seed": 1}) == [(0, 4)] * 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000004"]


def test_newer_checkpoints_of_a_road_not_taken_are_set_aside(pool, tmp_path):
    pool.run(2, _save, str(tmp_path), [2, 4], 2)
    assert pool.run(2, _load, str(tmp_path), str(tmp_path / "step_00000002"), {"seed": 1}) == [(0, 2)] * 2
    assert pool.run(2, _load, str(tmp_path), "auto", {"seed": 1}) == [(0, 2)] * 2
    assert (tmp_path / "set_aside_step_00000004.1" / COMPLETE).is_file()


def _refuse(ranks: Ranks, folder: str) -> list:
    said = []
    checkpointer = Checkpointer(Path(folder), ranks)
    for content in ({"step": 3}, _tensors(ranks, 0)):
        try:
            checkpointer.finish(Snapshot(1, {}, {}, {}), lambda content=content: content)
        except FsdpQloraError as error:
            said.append((error.exit_code, str(error)))
    return said


def test_what_is_no_tensor_and_what_cannot_be_written_is_an_error_on_every_rank(pool, tmp_path):
    (tmp_path / "file").write_text("a file where a folder is needed")
    for said in pool.run(2, _refuse, str(tmp_path / "file")):
        assert [code for code, _ in said] == [77, 74]
        assert "only tensors" in said[0][1] and "rank 0 could not write" in said[1][1]
