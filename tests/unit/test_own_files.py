"""S8, R15: what we write goes where it belongs and nowhere else; what a kill left half written goes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fsdp_qlora.errors import RunFolderError, SecurityError
from fsdp_qlora.files.scratch import fresh_folder, move_into, scratch_folder
from fsdp_qlora.files.write import append_to, replacing, write_first, write_text
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.track.tracker import JsonLines
from fsdp_qlora.track.unwritten import Unwritten

CANARY = "the user's own"
WRITTEN = [".lock", "config.yaml", "versions.json", "metrics.jsonl", "summary.json", "exit.json", "answers.jsonl",
           "bad_rows.jsonl", ".config.yaml.part", "wandb", "wandb_run_id", "checkpoints", "adapter", "profile",
           "adapter/adapter_config.json", "checkpoints/latest", "checkpoints/step_00000002", "profile/phases.json",
           "checkpoints/step_00000002/manifest.json", "adapter/x/deep/er"]  # fmt: skip


def _folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "outputs"), "run")
    folder.create()
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's that nobody may change."""
    file = tmp_path / "bashrc"
    file.write_text(CANARY)
    return file


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("to", ["a file", "a folder", "nothing yet"])
def test_a_run_folder_that_holds_links_is_refused(tmp_path, mine, name, to):
    """S8: nothing is written through a link, and nothing at all into such a folder."""
    folder = _folder(tmp_path)
    aim = {"a file": mine, "a folder": tmp_path, "nothing yet": tmp_path / "new"}[to]
    (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / name).symlink_to(aim)
    with pytest.raises(SecurityError, match="is a link") as refused:
        folder.lock()
    assert str(folder.path / name) in str(refused.value) and refused.value.exit_code == 77
    assert mine.read_text() == CANARY and not (tmp_path / "new").exists()
    (folder.path / name).unlink()
    folder.lock()  # the refusal has let go of it


def _pipe(file: Path) -> None:
    os.mkfifo(file)


def _socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(file))


@pytest.mark.parametrize("name", [".lock", "exit.json", "config.yaml", "checkpoints"])
@pytest.mark.parametrize("make", [_pipe, _socket])
@pytest.mark.timeout(20)
def test_pipes_are_refused_and_not_waited_for(tmp_path, monkeypatch, name, make):
    """S8: the same for what would hang."""
    folder = _folder(tmp_path)
    monkeypatch.chdir(folder.path)  # a socket's path is short
    make(Path(name))
    with pytest.raises(SecurityError, match=name):
        folder.lock()
    assert folder.read_exit() is None


@pytest.mark.parametrize("name", [".lock", ".lock.holder", "metrics.jsonl", "exit.json", "config.yaml"])
def test_another_name_of_the_users_file_is_not_written_into(tmp_path, mine, name):
    """S8: hard links, too: an archive can hold one."""
    folder = _folder(tmp_path)
    os.link(mine, folder.path / name)
    folder.lock()
    folder.clear_exit()
    folder.begin({"run": {}})
    folder.write_exit(0, 0)
    _metrics(folder.metrics_file)
    folder.unlock()
    assert mine.read_text() == CANARY


def test_a_backup_by_hard_links_ends_no_run_and_keeps_what_was(tmp_path):
    """S8: `cp -al`, rsnapshot and their like, while a run writes."""
    folder = _folder(tmp_path)
    folder.lock()
    sink = JsonLines(folder.metrics_file, 0, Unwritten())
    sink.log(1, {"loss": 1.0})
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in folder.path.iterdir():
        os.link(file, backup / file.name)
    sink.log(2, {"loss": 2.0})
    sink.close()
    other = RunFolder(str(folder.path.parent), folder.path.name)
    with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
        other.lock()
    folder.unlock()
    other.lock()
    other.unlock()
    assert (backup / "metrics.jsonl").read_text().count("\n") == 1
    assert folder.metrics_file.read_text().count("\n") == 2


def test_the_users_own_links_to_a_run_folder_and_wandbs_inside_it_are_fine(tmp_path):
    """S8: what is refused is what lies in the folder."""
    (tmp_path / "big_disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "big_disk")
    folder = _folder(tmp_path)
    (folder.path / "wandb/run-1").mkdir(parents=True)
    (folder.path / "wandb/latest-run").symlink_to("run-1")
    folder.lock()
    folder.unlock()
    # as W&B 0.31 does: a link to its log in the cache; we write nothing there
    (folder.path / "wandb/run-1/debug-core.log").symlink_to(tmp_path / "bashrc")
    (folder.path / "best").symlink_to("wandb")
    folder.lock()
    folder.unlock()
    (folder.path / "debug.log").symlink_to(tmp_path / "bashrc")
    with pytest.raises(SecurityError, match=r"debug\.log is a link"):
        folder.lock()


def _replace(file: Path) -> None:
    write_text(file, "new")


def _append(file: Path) -> None:
    with append_to(file) as stream:
        stream.write(b"new")


def _metrics(file: Path) -> None:
    sink = JsonLines(file, 0, Unwritten())
    sink.log(1, {"loss": 1.0})
    sink.close()


@pytest.mark.parametrize("write", [_replace, _append, _metrics, lambda file: write_first(file, "new")])
def test_a_link_that_comes_later_is_not_written_through(tmp_path, mine, write):
    """S8: the writers themselves follow none, however it came there."""
    link = tmp_path / "file"
    for aim in (mine, tmp_path / "new"):
        link.unlink(missing_ok=True)
        link.symlink_to(aim)
        try:
            write(link)
        except SecurityError as error:
            assert "is a link" in str(error)
        assert mine.read_text() == CANARY and not (tmp_path / "new").exists()


def test_no_staging_name_can_be_known(tmp_path, mine):
    """S8: and one that is known all the same is not written through."""
    seen = []
    for _ in range(2):
        with replacing(tmp_path / "file") as stream:
            seen += [f.name for f in tmp_path.iterdir() if f.name.endswith(".part")]
            stream.write(b"new")
    assert len(set(seen)) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bashrc", "file"]


def test_what_is_written_follows_the_umask(tmp_path):
    """S16: a file is open to those that the umask lets, and no others."""
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "closed", "x")
        os.umask(0o022)
        write_text(tmp_path / "open", "x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("closed", "open")] == [0o600, 0o644]


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path):
    """R12: the message of a full disk says where."""
    file = tmp_path / "file"
    write_text(file, "old")
    with pytest.raises(OSError, match=f"{file}'"), replacing(file) as stream:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


LEFT = [".config.yaml.0123456789abcdef.part", ".summary.json.part", ".latest.part", ".metrics.jsonl.tmp",
        ".exit.json.4711", ".adapter.0123456789abcdef.part"]  # fmt: skip
KEPT = [".notes.part", "summary.json.part", ".hidden", ".exit.json.bak", "x.0123456789abcdef.part"]


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    """R15: by who has the lock, and only names of ours."""
    folder = _folder(tmp_path)
    for place in (folder.path, folder.checkpoints):
        place.mkdir(exist_ok=True)
        for name in (*LEFT[:-1], *KEPT):
            (place / name).write_text("half")
        (place / LEFT[-1]).mkdir()
        (place / LEFT[-1] / "half").write_text("half")
    folder.lock()
    assert {f.name for f in folder.path.iterdir()} == {*KEPT, ".lock", ".lock.holder", "checkpoints"}
    assert {f.name for f in folder.checkpoints.iterdir()} == set(KEPT)


def test_where_locks_are_unknown_nothing_is_swept(tmp_path):
    """R15: another run may be writing it."""

    def unknown(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    folder = _folder(tmp_path)
    (folder.path / LEFT[0]).write_text("half")
    folder.lock(unknown)
    assert (folder.path / LEFT[0]).exists()


def _old(folder: Path) -> Path:
    hours_ago = time.time() - 7200
    os.utime(folder, (hours_ago, hours_ago))
    return folder


def test_scratch_folders_of_dead_processes_go_and_those_in_use_stay(tmp_path, monkeypatch):
    """R15: kill -9 leaves no folder for ever; a folder that a living process holds is never taken from it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from fsdp_qlora.files.scratch import scratch_folder\n"
        "with scratch_folder('ours-') as mine: print(mine, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        folder = _old(Path(other.stdout.readline().strip()))
        _old(tmp_path / folder.name).joinpath("half").touch()
        _old(folder)
        (tmp_path / "ours-young").mkdir()
        (tmp_path / "ours-link").symlink_to(tmp_path)
        with scratch_folder("ours-"):
            assert folder.exists()
        other.kill()
        other.wait()
        with scratch_folder("ours-") as mine:
            left = {f.name for f in tmp_path.iterdir()}
        assert left == {"ours-young", "ours-link", mine.name} and not mine.exists()


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path):
    """R15: gigabytes of a base that was being written, say; not another's, nor what is being written now."""
    names = [f".base.{n:016x}.part" for n in range(3)]
    for name in (*names, ".other.0123456789abcdef.part", ".base.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
        _old(tmp_path / name)
    (tmp_path / names[1] / "young").touch()
    with fresh_folder(tmp_path / "base"):
        pass
    assert {f.name for f in tmp_path.iterdir()} == {names[1], ".other.0123456789abcdef.part", ".base.part"}


def test_two_at_once_never_mix_their_files(tmp_path):
    """R17: two exports to one target: each file is of the same one."""
    names = [f"file{n}" for n in range(40)]
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text(CANARY)

    def export(who: str) -> None:
        with fresh_folder(target) as staging:
            for name in names:
                (staging / name).write_text(who)
            barrier.wait()
            move_into(staging, target)

    for _ in range(5):
        barrier = threading.Barrier(2)
        both = [threading.Thread(target=export, args=(who,)) for who in "ab"]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert len({(target / name).read_text() for name in names}) == 1
    assert sorted(f.name for f in target.iterdir()) == sorted([*names, "mine"])
    assert [f.name for f in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_is_moved_into_another_writes_through_no_link(tmp_path, mine):
    """S8: files that are links are replaced, folders that are links refused."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    (target / "file").symlink_to(mine)
    (target / "inner").symlink_to(elsewhere)
    with pytest.raises(SecurityError, match="inner is a link"), fresh_folder(target) as staging:
        (staging / "file").write_text("new")
        (staging / "inner").mkdir()
        (staging / "inner/x").write_text("new")
        move_into(staging, target)
    assert mine.read_text() == CANARY and not any(elsewhere.iterdir())
    assert fcntl.flock(os.open(target, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB) is None
