"""Ranks that hang are named; ranks that die are started again, also on fewer nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import warm
from tests.build import essence, metrics
from tests.processes import alive, rank_pid, ranks_of, start, wait_for_step

pytestmark = pytest.mark.launch


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_rank_is_named_and_all_end(cli_env, tiny_run, tmp_path, rank):
    """R1: rank 0, which every other rank asked before, is named like any other one."""
    run = ["train", *tiny_run, "train.max_steps=5000", "launcher.nproc_per_node=2", "launcher.timeout_seconds=10"]
    process = start(run, cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 3, process)
    ranks = ranks_of(process)
    os.kill(rank_pid(process, rank), signal.SIGSTOP)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=240)
    assert time.monotonic() - stopped < 30
    last = err.strip().splitlines()[-1]
    never, still = f"rank {rank} never reached 'step", f"rank {rank} is stuck in 'step"
    assert process.returncode == 1 and (never in last or still in last), err
    assert not any(alive(pid) for pid in ranks)
    assert json.loads((tmp_path / "outputs/tiny/exit.json").read_text())["message"] in last


@pytest.mark.full
def test_a_killed_rank_is_started_again_and_nothing_differs(cli_env, tiny_run, tmp_path):
    run = [
        "train", *tiny_run, "train.max_steps=40", "lora.dropout=0.1", "checkpoint.every_steps=5", "train.eval_every=10",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    codes, text = warm.run(run, whole, cli_env)
    assert codes == [0, 0], text
    process = start([*run, "launcher.nproc_per_node=2", "launcher.max_restarts=2"], cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 12, process)
    os.kill(rank_pid(process, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "restart 1: resuming from the last checkpoint" in out
    assert essence(metrics(tmp_path / "outputs/tiny")) == essence(metrics(whole / "outputs/tiny"))


@pytest.mark.full
def test_what_would_fail_again_is_not_started_again(cli, tiny_run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not json\n")
    started = time.monotonic()
    run = [*tiny_run, f"data.train={rows}", "launcher.nproc_per_node=2", "launcher.max_restarts=3"]
    result = cli("train", *run)
    assert result.returncode == 2 and "rows.jsonl" in result.stderr
    assert time.monotonic() - started < 60


@pytest.mark.full
@pytest.mark.timeout(400)
def test_goes_on_with_one_node_of_two(cli_env, tiny_run, tmp_path):
    """`--nnodes 1:2`: the second node is lost, the first goes on alone from the last checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ["train", *tiny_run, "train.max_steps=60", "checkpoint.every_steps=5"]
    agents = []
    for node in range(2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
            "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
            "--rdzv-id", "elastic", "--rdzv-conf", f"is_host={node == 0},last_call_timeout=5",
            "-m", "fsdp_qlora", *run,
        ]  # fmt: skip
        with (tmp_path / f"node{node}.txt").open("w") as output:
            agents.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env={**cli_env, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                )
            )
        time.sleep(0.5)
    try:
        wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 8, agents[0])
        _kill_tree(agents[1])
        assert agents[0].wait(timeout=240) == 0, (tmp_path / "node0.txt").read_text()
    finally:
        for agent in agents:
            _kill_tree(agent)
    lines = metrics(tmp_path / "outputs/tiny")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    worlds = [
        json.loads(manifest.read_text())["world_size"]
        for manifest in (tmp_path / "outputs/tiny/checkpoints").glob("step_*/manifest.json")
    ]
    assert set(worlds) == {1}


def _kill_tree(agent: subprocess.Popen[bytes]) -> None:
    for pid in ranks_of(agent):
        os.kill(pid, signal.SIGKILL)
    if agent.poll() is None:
        agent.kill()
    agent.wait()
