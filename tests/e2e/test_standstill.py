"""What never comes back ends the run within its time, with the rank, the place and the right code."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.distributed.meeting import MEETING_VARIABLE
from tests import warm
from tests.processes import alive, ranks_of, start, wait_for_step
from tests.tiers import some_in_full

SECONDS = 10
HELD = {
    "a rank's tensors": (1, r"open .*\.saving_.*shard-00002", "rank 1 is stuck in 'writing the checkpoint"),
    "what makes it complete": (0, r"open .*COMPLETE", "rank 0 is stuck in 'writing the checkpoint"),
    "the settings": (0, r"open .*config\.yaml", "rank 0 is stuck in 'finding the checkpoint"),
    "the adapter": (0, r"open .*[^_]/outputs/tiny/\.?adapter", "rank 0 is stuck in 'writing the adapter'"),
    "a line of metrics": (0, r"open .*metrics\.jsonl", "rank 0 is stuck in 'answers after step 0'"),
}


@pytest.mark.launch
@pytest.mark.parametrize("what", some_in_full(list(HELD), ["a rank's tensors"]))
def test_a_file_that_is_never_written_ends_the_run(cli_env, tiny_run, tmp_path, what):
    """R2: a storage that hangs, in the thread that saves or in the one that trains."""
    rank, hold, words = HELD[what]
    run = [
        "train", *tiny_run, "train.max_steps=6", "checkpoint.every_steps=2", f"launcher.timeout_seconds={SECONDS}",
    ]  # fmt: skip
    fault = warm.Fault(rank, str(tmp_path / "outputs"), hold=hold)
    started = time.monotonic()
    codes, text = warm.run(run, tmp_path, cli_env, fault=fault)
    assert codes[rank] == 74 and words in text, text
    assert time.monotonic() - started < 60
    ended = json.loads((tmp_path / "outputs/tiny/exit.json").read_text())
    assert (ended["code"], ended["rank"]) == (74, rank)
    complete = complete_checkpoints(tmp_path / "outputs/tiny/checkpoints")
    codes, text = warm.run(run, tmp_path, cli_env)
    assert codes == [0, 0], text
    assert not complete or "step" in text


@pytest.mark.launch
def test_a_stopped_rank_0_is_named(cli_env, tiny_run, tmp_path):
    """R1: also where each of the others waits for it in a collective; nobody has to ask it anything."""
    meeting = tmp_path / "meeting"
    meeting.mkdir(mode=0o700)
    run = ["train", *tiny_run, "train.max_steps=5000", f"launcher.timeout_seconds={SECONDS}"]
    ranks = warm.start(run, tmp_path, {**cli_env, MEETING_VARIABLE: str(meeting)})
    metrics = tmp_path / "outputs/tiny/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and '"step": 3' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks.kill(signal.SIGSTOP, [0])
    ranks.processes[1].join(SECONDS + 10)
    code, text = ranks.processes[1].exitcode, ranks.text()
    ranks.kill()
    assert code == 1, text
    assert "rank 0 never reached 'step" in text or "rank 0 is stuck in 'step" in text, text


@pytest.mark.full
@pytest.mark.launch
def test_the_launcher_names_ranks_that_all_stand_still(cli_env, tiny_run, tmp_path):
    """R1: where no rank is left to say so; a checkpoint is gone on from."""
    run = [
        "train", *tiny_run, "train.max_steps=5000", "checkpoint.every_steps=2", "launcher.nproc_per_node=2",
        f"launcher.timeout_seconds={SECONDS}",
    ]  # fmt: skip
    process = start(run, cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 5, process)
    ranks = ranks_of(process)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - stopped < SECONDS + 10
    last = err.strip().splitlines()[-1]
    assert process.returncode == 1 and "all ranks are stuck" in last and "rank 1 in 'step" in last, err
    assert json.loads((tmp_path / "outputs/tiny/exit.json").read_text())["message"] in last
    assert not any(alive(pid) for pid in ranks)
    again = [*run[:-2], "train.max_steps=20", "checkpoint.resume_overrides=[train.max_steps]"]
    codes, text = warm.run(again, tmp_path, cli_env)
    assert codes == [0, 0], text


@pytest.mark.launch
@pytest.mark.parametrize("seconds", some_in_full([0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0], [1.0]))
def test_a_signal_before_the_first_step_is_answered_at_once(cli_env, tiny_run, tmp_path, seconds):
    """R11: nothing is to be saved, so nothing is waited for."""
    ranks = warm.start(["train", *tiny_run, "train.max_steps=5000"], tmp_path, cli_env)
    time.sleep(seconds)
    ranks.kill(signal.SIGTERM)
    sent = time.monotonic()
    codes = ranks.wait(30)
    assert time.monotonic() - sent < 6, ranks.text()
    early = {75, -signal.SIGTERM}  # the second one: before Python had taken any signal
    assert set(codes) <= early, ranks.text()


@pytest.mark.full
@pytest.mark.launch
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("seconds", [1.0, 2.0, 5.0, 9.0])
def test_the_command_line_ends_with_75_before_the_first_step(cli_env, tiny_run, tmp_path, num_ranks, seconds):
    """R11: from its first second on, whatever it is importing."""
    run = ["train", *tiny_run, "train.max_steps=5000", f"launcher.nproc_per_node={num_ranks}"]
    process = start(run, cli_env, tmp_path)
    time.sleep(seconds)
    if (tmp_path / "outputs/tiny/metrics.jsonl").exists():
        pytest.skip("this machine starts a run faster than that")
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 8, err
    assert process.returncode == 75, err
    last = [text.strip().splitlines()[-1] for text in (out, err) if text.strip()]
    assert any("nothing to save" in line for line in last)  # on stdout if the model is loaded already


@pytest.mark.full
@pytest.mark.launch
def test_a_save_that_outlasts_its_grace_loses_nothing_older(cli_env, tiny_run, tmp_path):
    """R2: asked to stop while a save takes too long, then killed as a cluster does; the checkpoint before it is whole."""
    run = ["train", *tiny_run, "train.max_steps=6", "checkpoint.every_steps=2"]
    fault = warm.Fault(0, str(tmp_path / "outputs"), hold=r"open .*step_00000004.*COMPLETE")
    ranks = warm.start(run, tmp_path, cli_env, fault=fault)
    checkpoints = tmp_path / "outputs/tiny/checkpoints"
    deadline = time.monotonic() + 60
    while not (checkpoints / "step_00000004").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks.kill(signal.SIGTERM)
    time.sleep(5)
    ranks.kill()
    assert [folder.name for folder in complete_checkpoints(checkpoints)] == ["step_00000002"], ranks.text()
    codes, text = warm.run(run, tmp_path, cli_env)
    assert codes == [0, 0], text
    assert "step_00000006" in {folder.name for folder in complete_checkpoints(checkpoints)}
