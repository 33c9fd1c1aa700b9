"""metrics.jsonl is cut back on a resume; the lock is the kernel's; the first failure stays."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fsdp_qlora.errors import RunFolderError
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.track.tracker import JsonLines
from fsdp_qlora.track.unwritten import Unwritten


def test_lines_after_the_checkpoint_are_cut_and_those_before_stay_byte_identical(tmp_path):
    file = tmp_path / "metrics.jsonl"
    sink = JsonLines(file, 0, Unwritten())
    for step in range(1, 6):
        sink.log(step, {"loss": 1 / step})
    sink.close()
    before = file.read_bytes()
    with file.open("a") as half:
        half.write('{"time": 1, "ste')
    JsonLines(file, 3, Unwritten()).close()
    assert file.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    JsonLines(file, 0, Unwritten()).close()
    assert file.read_bytes() == b""


def test_a_second_process_is_refused_by_name_and_a_dead_one_blocks_nothing(tmp_path):
    folder = RunFolder(str(tmp_path), "r")
    folder.create()
    code = (
        "import sys, time; from fsdp_qlora.run.folder import RunFolder; f = RunFolder(sys.argv[1], 'r');"
        "f.lock(); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=f"in use by process {other.pid} on"):
            folder.lock()
        other.kill()
    folder.lock()


def test_the_first_exit_stays(tmp_path):
    folder = RunFolder(str(tmp_path), "r")
    folder.create()
    assert folder.write_exit(2, 1, "first")
    assert not folder.write_exit(1, 0, "second")
    assert folder.read_exit()["message"] == "first"
    assert sorted(p.name for p in folder.path.iterdir()) == ["exit.json"]


def test_a_finished_run_is_moved_away_whole(tmp_path):
    folder = RunFolder(str(tmp_path), "r")
    folder.create()
    folder.lock()
    folder.begin({"a": 1})
    folder.write_summary({"steps": 3})
    assert folder.finished
    assert folder.move_away() == tmp_path / "r.1"
    assert not folder.finished and not folder.started
    assert json.loads((tmp_path / "r.1" / "summary.json").read_text()) == {"steps": 3}
