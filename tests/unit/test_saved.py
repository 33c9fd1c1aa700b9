"""R16, S16, R17: what a save says and leaves on disks that are not as they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.publish import remove, tidy
from fsdp_qlora.cli import embedded
from fsdp_qlora.errors import StorageError
from fsdp_qlora.run.folder import RunFolder
from tests.forged import make_checkpoint
from tests.unit.test_unwritten import room


@contextmanager
def _undeletable(folder: Path) -> Iterator[None]:
    """Make the content of a folder stay: by its mode, or for root by a mount in it."""
    if os.geteuid():
        folder.chmod(0o500)
        try:
            yield
        finally:
            folder.chmod(0o700)
        return
    inner = folder / "mounted"
    inner.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "x", str(inner)], capture_output=True, check=False).returncode:
        pytest.skip("root can delete everything here, and mount nothing")
    try:
        yield
    finally:
        for where in folder.parent.parent.glob("*/*/mounted"):  # it was renamed meanwhile
            subprocess.run(["umount", str(where)], check=False, capture_output=True)


def test_what_cannot_be_deleted_is_said_and_tried_again(tmp_path):
    """R16: with the path and the reason; the rest of it goes, and all of it as soon as it can."""
    old, newer = tmp_path / "step_00000002", tmp_path / "step_00000004"
    for folder in (old, newer):
        make_checkpoint(folder)
    assert remove(newer) is None
    with _undeletable(old / "adapter"):
        problem = remove(old)
        assert problem is not None and str(tmp_path) in problem and problem.endswith(("busy", "denied"))
        assert not old.exists() and not list(tmp_path.glob("*/*.safetensors"))
        assert tidy(tmp_path) == [problem]
    make_checkpoint(newer)
    assert remove(newer) is None
    assert list(tmp_path.iterdir()) == []


SAVING = """
import os, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor, Shard
from fsdp_qlora.run.world import open_world
from fsdp_qlora.checkpoint.checkpointer import Checkpointer, Snapshot
from fsdp_qlora.checkpoint.retention import Retention
from fsdp_qlora.config.schema import from_dict
os.umask(0o077)
world, said = open_world(from_dict({"launcher": {"device": "cpu"}})), []
ranks = world.ranks
checkpointer = Checkpointer(Path(sys.argv[1]), ranks, Retention(1), say=said.append)
for step in range(1, 5):
    tensors = {"model.a": DTensor.from_local(torch.ones(2, 3), ranks.mesh, [Shard(0)])}
    checkpointer.save(Snapshot(step, {}, {}, {}), lambda: tensors)
    checkpointer.settle()
    if step == 1:
        held = Path(sys.argv[1]) / "step_00000001/held"
        held.mkdir()
        os.system(f"mount -t tmpfs x {held}")
print("said", len(said), said)
checkpointer.close()
os._exit(0)
"""


@pytest.mark.full
def test_a_run_whose_retention_fails_says_so_once_and_goes_on(tmp_path):
    """R16: the saves count; S16: and what they write is closed to others where the umask is."""
    if os.geteuid():
        pytest.skip("needs a mount")
    try:
        done = subprocess.run(
            [sys.executable, "-c", SAVING, str(tmp_path)], capture_output=True, text=True, check=False
        )
    finally:
        for held in tmp_path.glob("*/held"):
            subprocess.run(["umount", str(held)], check=False, capture_output=True)
    assert "said 1 ['checkpoint.keep_last: an old checkpoint cannot be deleted" in done.stdout, (
        done.stdout + done.stderr
    )
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left == [".removing_step_00000001", "latest", "step_00000004"]
    open_checkpoint(tmp_path / "step_00000004")
    modes = {f.stat().st_mode & 0o777 for f in (tmp_path / "step_00000004").iterdir()}
    assert modes == {0o600}, modes


OTHERS = {"everybody can write to": (lambda path: path.chmod(0o777)),
          "belongs to another user": (lambda path: os.chown(path, 4711, 4711))}  # fmt: skip


@pytest.mark.parametrize("why", OTHERS)
@pytest.mark.parametrize("name", [".", "manifest.json", "adapter", "adapter/adapter_model.safetensors"])
def test_a_checkpoint_that_others_can_change_is_said(tmp_path, capfd, why, name):
    """S16: it is used, with a word."""
    if os.geteuid() and "belongs" in why:
        pytest.skip("only root gives files away")
    folder = tmp_path / "step_00000002"
    make_checkpoint(folder)
    open_checkpoint(folder)
    assert capfd.readouterr().err == ""
    OTHERS[why](folder / name)
    open_checkpoint(folder)
    said = capfd.readouterr().err
    assert why in said and str(folder / name) in said and said.count("\n") == 1


@pytest.mark.parametrize("why", OTHERS)
def test_a_run_folder_that_others_can_change_is_said(tmp_path, capfd, why):
    """S16: at the start of a run."""
    if os.geteuid() and "belongs" in why:
        pytest.skip("only root gives files away")
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    folder.lock()
    folder.unlock()
    assert capfd.readouterr().err == ""
    OTHERS[why](folder.path)
    folder.lock()
    assert why in capfd.readouterr().err


def test_a_full_disk_while_the_embedded_model_is_made_is_74(tmp_path, monkeypatch):
    """R17: safetensors has an error of its own for it. Nothing half is left."""

    def make(staging: Path, say: object) -> None:
        (staging / "config.json").write_text(json.dumps({}))
        with room(10_000):
            save_file({"x": torch.ones(10_000)}, staging / "model.safetensors")

    monkeypatch.setattr(embedded, "_make_model", make)
    with pytest.raises(StorageError, match="embedded cannot be written") as told:
        embedded.fetch_embedded(tmp_path)
    assert told.value.exit_code == 74 and list((tmp_path / "embedded").iterdir()) == []
