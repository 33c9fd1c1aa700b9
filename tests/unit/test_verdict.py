"""R9: one verdict, whatever the ranks, the agent and signals leave behind; exit code, exit.json and last line say it."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from fsdp_qlora.cli import launcher
from fsdp_qlora.cli.verdict import record, stopped_by, verdict
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import DataError, StorageError
from fsdp_qlora.run.exit import Ending, ending_of
from fsdp_qlora.run.folder import RunFolder

ECHO = Ending(1, 0, "RuntimeError: connection closed by peer", expected=False, time=1.0)
REASON = Ending(74, 1, "rank 1 could not write", time=2.0)
STOPPED = Ending(75, 0, time=3.0)
DONE = Ending(0, 0, time=1.0)
STILL = Ending(1, 0, "all ranks are stuck")


def _judge(folder: Path, told: list[Ending], agent: dict | None = None, code: int = 1, attempt: int = 0, **more):
    for rank, ending in enumerate(told):
        (folder / f"exit.json.{attempt}.{rank}").write_text(json.dumps(asdict(ending)))
    if agent is not None:
        (folder / "agent.json").write_text(json.dumps(agent))
    return verdict(folder / "exit.json", attempt, code, **more)


@pytest.mark.parametrize(
    ("told", "agent", "expected"),
    [
        ([ECHO, REASON], None, (74, 1, "rank 1 could not write")),
        ([REASON, ECHO], {"rank": 1, "code": -9}, (74, 1, "rank 1 could not write")),
        ([ECHO], {"rank": 1, "code": -9}, (1, 1, "rank 1 was killed by SIGKILL")),
        ([ECHO], {"rank": 1, "code": -15}, (1, 0, "connection closed")),
        ([STOPPED, STOPPED], {"rank": 0, "code": 75}, (75, 0, "")),
        ([STOPPED, ECHO], None, (75, 0, "")),
        ([DONE, ECHO], None, (1, 0, "connection closed")),
        ([], {"rank": 0, "code": -11}, (1, 0, "SIGSEGV")),
        ([], None, (1, 0, "without reporting an error (launcher code 1)")),
    ],
)
def test_what_ended_a_run(tmp_path, told, agent, expected):
    found = _judge(tmp_path, told, agent)
    assert (found.code, found.rank) == expected[:2] and expected[2] in found.message


def test_a_run_that_ended_well(tmp_path):
    assert _judge(tmp_path, [DONE, DONE], code=0).code == 0


def test_ranks_that_all_stand_still_are_named_by_the_launcher(tmp_path):
    assert _judge(tmp_path, [], code=-9, standstill=STILL) == STILL
    assert _judge(tmp_path, [REASON], code=-9, standstill=STILL).code == 74


@pytest.mark.parametrize(("signals", "begun", "code"), [(1, False, 75), (2, False, 1), (2, True, 1), (1, True, 143)])
def test_signals_before_a_rank_could_tell_anything(tmp_path, signals, begun, code):
    found = _judge(tmp_path, [], code=143, stopped=stopped_by(signals, begun))
    assert found.code == code, found
    assert ("nothing to save" in found.message) is (code == 75)


@pytest.mark.parametrize(("signals", "code"), [(1, 75), (2, 1)])
def test_a_stopped_verb_that_saves_nothing_speaks_of_no_checkpoint(tmp_path, signals, code):
    found = _judge(tmp_path, [], code=143, stopped=stopped_by(signals, False, saves=False))
    assert found.code == code and "stopped" in found.message
    assert "save" not in found.message and "checkpoint" not in found.message


@pytest.mark.parametrize(("verb", "answer"), [
    ("train", "saving, then exiting"), ("evaluate", "exiting"), ("generate", "exiting"),
])  # fmt: skip
def test_the_launcher_promises_to_save_only_what_is_saved(monkeypatch, tmp_path, capfd, verb, answer):
    start = subprocess.Popen
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda _, **settings: start(["sleep", "60"], **settings))
    monkeypatch.setattr(launcher, "take_signals", lambda _, forward: forward(signal.SIGTERM, None) or {})
    config = from_dict({"run": {"output_root": str(tmp_path)}, "launcher": {"max_restarts": 0}})
    assert launcher.launch(verb, config, 2) == 75
    said = capfd.readouterr().err
    assert f"SIGTERM: {answer}; send it again" in said
    assert ("save" in said) is (verb == "train")


def test_a_second_signal_does_not_hide_that_all_was_saved(tmp_path):
    assert _judge(tmp_path, [STOPPED, STOPPED], code=-9, stopped=stopped_by(2, True)).code == 75


def test_a_second_signal_while_a_finished_run_leaves_changes_nothing(tmp_path):
    assert _judge(tmp_path, [DONE, DONE], code=-9, stopped=stopped_by(2, True)).code == 0


@pytest.mark.parametrize("odd", ["{}", "[]", '{"code": "0", "rank": 0, "message": "", "time": 1}', "", '{"code": 0}'])
def test_an_odd_exit_json_is_none_and_is_written_anew(tmp_path, odd):
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    folder.exit_file.write_text(odd)
    assert folder.read_exit() is None
    record(STOPPED, folder, time.time())
    assert (folder.read_exit() or {})["code"] == 75


def test_what_is_wrong_with_the_folder_does_not_change_the_verdict(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    (folder.path / "away").symlink_to("/etc")
    record(DONE, folder, time.time())
    assert folder.read_exit() is None


def test_a_folder_that_is_let_go_of_late_is_waited_for(tmp_path):
    folder, other = RunFolder(str(tmp_path), "run"), RunFolder(str(tmp_path), "run")
    folder.create()
    other.lock()
    threading.Timer(0.5, other.unlock).start()
    record(REASON, folder, time.time())
    assert (folder.read_exit() or {})["code"] == 74


def test_the_last_start_counts(tmp_path):
    _judge(tmp_path, [ECHO], attempt=0)
    assert _judge(tmp_path, [DONE, DONE], code=0, attempt=1).code == 0


def test_half_a_file_tells_nothing(tmp_path):
    (tmp_path / "exit.json.0.1").write_text('{"code": 7')
    assert _judge(tmp_path, [REASON]).code == 74


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (DataError("row 7"), 2, True),
        (StorageError("full"), 74, True),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 74, True),
        (OSError(errno.EPIPE, "broken"), 1, False),
        (RuntimeError("gloo"), 1, False),
        (SystemExit(3), 3, False),
        (KeyboardInterrupt(), 130, True),
    ],
)
def test_a_rank_ends_alike_on_the_screen_and_in_its_files(error, code, expected):
    ending = ending_of(error)
    assert (ending.code, ending.expected) == (code, expected)


def test_exit_json_is_set_right_but_never_another_runs(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    began = time.time()
    folder.write_exit(1, 0, "an echo")
    record(REASON, folder, began)
    assert (folder.read_exit() or {})["code"] == 74
    other = RunFolder(str(tmp_path), "run")
    other.lock()
    record(ECHO, folder, began)
    assert (folder.read_exit() or {})["code"] == 74, "somebody else has the folder"
    other.unlock()
    record(DONE, folder, time.time() + 1)
    assert (folder.read_exit() or {})["code"] == 0, "what an earlier start left is not of this one"
    missing = RunFolder(str(tmp_path), "never began")
    record(REASON, missing, began)
    assert not missing.path.exists()
