"""The scripts in launch/: what they hand to torchrun, srun and scontrol, and how they fail.

Clusters are played by small executables on a PATH of its own: they record their arguments, so that a machine with or
without SLURM gives the same result. Two tests start the real torchrun.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ranks_of, wait_for_step
from tests.tiers import some_in_full

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

FAKES = {
    # One argument a line, one file a node; then ends as the test says.
    "torchrun": """
        printf '%s\\n' "$@" >"$RECORD/torchrun.${SLURM_NODEID:-${NODE:-0}}"
        printf '%s\\n' "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >"$RECORD/shutdown"
        if [ -n "${FAKE_EXIT_JSON:-}" ]; then
          mkdir -p outputs/first
          printf '%s\\n' "$FAKE_EXIT_JSON" >outputs/first/exit.json
        fi
        exit "${FAKE_CODE:-0}"
    """,
    # Starts the command once for each node, all at the same time, and returns the worst code.
    "srun": """
        printf '%s\\n' "$@" >"$RECORD/srun"
        while [[ ${1:-} == --* ]]; do shift; done
        pids=()
        for ((node = 0; node < SLURM_NNODES; node++)); do
          SLURM_NODEID=$node "$@" &
          pids+=($!)
          echo "$!" >"$RECORD/pid.$node"
        done
        worst=0
        for pid in "${pids[@]}"; do wait "$pid" || worst=$?; done
        exit "$worst"
    """,
    "scontrol": """
        printf '%s\\n' "$*" >>"$RECORD/scontrol"
        if [ "$1" = show ]; then printf '%s' "$FAKE_HOSTS"; exit "${FAKE_SHOW_CODE:-0}"; fi
    """,
    "sleep": ":",
}


class Cluster:
    """A folder of fake executables, the environment that finds them, and what they recorded."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.record, self.work = folder / "bin", folder / "record", folder / "work"
        for new in (self.bin, self.record, self.work):
            new.mkdir()
        for name, body in FAKES.items():
            self.write(name, body)
        self.write("python3", f'exec "{sys.executable}" "$@"')
        for tool in ("bash", "cat", "sed", "mkdir", "env"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.env = {"PATH": str(self.bin), "RECORD": str(self.record), "FAKE_HOSTS": "node-a\nnode-b\n"}

    def write(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!{shutil.which('bash')}\nset -u\n{body}\n")
        file.chmod(0o755)

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(LAUNCH / script), *arguments], cwd=self.work, env=self.env | env, text=True, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip

    def recorded(self, name: str) -> list[str]:
        file = self.record / name
        return file.read_text().splitlines() if file.is_file() else []

    def sbatch(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run slurm.sbatch as SLURM would on the first of two nodes."""
        job = {
            "RUN_NAME": "first", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_GPUS_ON_NODE": "8",
        }  # fmt: skip
        return self.run("slurm.sbatch", *arguments, **(job | env))

    @property
    def requeued(self) -> bool:
        return "requeue 123456" in self.recorded("scontrol")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.launch
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_bash_reads_the_script(script):
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.launch
def test_torchrun_script(cluster):
    done = cluster.run("torchrun.sh", "4", "train", "a=b", "prompt=two words; $HOME", SHUTDOWN_SECONDS="7")
    assert done.returncode == 0, done.stderr
    assert cluster.recorded("torchrun.0") == [
        "--standalone", "--max-restarts", "0", "--nproc-per-node", "4", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
        "-m", "fsdp_qlora", "train", "a=b", "prompt=two words; $HOME",
    ]  # fmt: skip
    assert cluster.recorded("shutdown") == ["7"]


@pytest.mark.launch
def test_torchrun_script_refuses_and_explains(cluster):
    assert cluster.run("torchrun.sh", "--help").stdout.startswith("One machine, N ranks")
    for arguments, words in [
        ((), "NPROC VERB"),
        (("4",), "VERB"),
        (("many", "train"), "'many'"),
        (("0", "train"), "'0'"),
    ]:
        done = cluster.run("torchrun.sh", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
    assert not cluster.recorded("torchrun.0")


@pytest.mark.launch
@pytest.mark.parametrize("node", [0, 1])
def test_multinode_arguments(cluster, node):
    done = cluster.run(
        "multinode.sh", "train", "a=b", "prompt=two words", NNODES="2", NODE=str(node), HEAD="10.0.0.1:29500",
        NPROC="8", LOCAL_ADDR=f"10.0.0.{node + 1}", RDZV_ID="today",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cluster.recorded(f"torchrun.{node}") == [
        "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-id", "today", "--node-rank", str(node),
        "--master-addr", "10.0.0.1", "--master-port", "29500",
        "--local-addr", f"10.0.0.{node + 1}", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1",
        "-m", "fsdp_qlora", "train", "a=b", "prompt=two words",
    ]  # fmt: skip


@pytest.mark.launch
def test_multinode_defaults(cluster):
    assert cluster.run("multinode.sh", "train", NNODES="1", NODE="0", HEAD="a:1").returncode == 0
    given = cluster.recorded("torchrun.0")
    assert "--local-addr" not in given
    assert given[given.index("--nproc-per-node") + 1] == "gpu"


@pytest.mark.launch
def test_multinode_refuses_and_explains(cluster):
    shown = cluster.run("multinode.sh", "-h")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("NNODES", "NODE", "HEAD", "LOCAL_ADDR", "NPROC"))
    assert "set -" not in shown.stdout
    good = {"NNODES": "2", "NODE": "0", "HEAD": "node-a:29500"}
    wrong: list[tuple[dict[str, str], str]] = [
        ({}, "not set: NNODES NODE HEAD"),
        ({"NNODES": "2", "HEAD": "node-a:1"}, "not set: NODE"),
        (good | {"NODE": "2"}, "NODE is 2"),
        (good | {"NODE": "first"}, "'first'"),
        (good | {"NNODES": "0"}, "'0'"),
        (good | {"HEAD": "node-a"}, "host:port"),
        (good | {"NPROC": "all"}, "'all'"),
    ]
    for env, words in wrong:
        done = cluster.run("multinode.sh", "train", **env)
        assert done.returncode == 2
        assert words in done.stderr
    assert "VERB" in cluster.run("multinode.sh", **good).stderr
    assert not list(cluster.record.iterdir())


@pytest.mark.launch
def test_slurm_arguments(cluster):
    done = cluster.sbatch("model.name=x", "prompt=two words", SLURM_RESTART_COUNT="1", SLURM_CPUS_PER_TASK="4")
    assert done.returncode == 0, done.stderr
    given = cluster.recorded("srun")
    assert given[:2] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    for node in (0, 1):
        assert cluster.recorded(f"torchrun.{node}") == [
            "--node-rank", str(node), "--nnodes", "2", "--nproc-per-node", "8",
            "--rdzv-id", "123456-1", "--master-addr", "node-a", "--master-port", "23456",
            "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m", "fsdp_qlora", "train",
            "model.name=x", "prompt=two words", "run.name=first", "run.output_root=outputs", "checkpoint.resume=auto",
        ]  # fmt: skip
    assert cluster.recorded("scontrol") == ["show hostnames node-[a-b]"]
    assert cluster.recorded("shutdown") == ["120"]


@pytest.mark.launch
def test_slurm_asks_for_the_signal_and_the_requeue():
    directives = [x for x in (LAUNCH / "slurm.sbatch").read_text().splitlines() if x.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@120", "#SBATCH --open-mode=append"} <= set(directives)


@pytest.mark.launch
def test_slurm_fails_loudly_without_scontrol(cluster):
    (cluster.bin / "scontrol").unlink()
    done = cluster.sbatch()
    assert done.returncode == 2
    assert "scontrol is not on PATH" in done.stderr
    assert not cluster.recorded("srun")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"FAKE_HOSTS": ""}, "gave no host"),
        ({"FAKE_SHOW_CODE": "1"}, "failed"),
        ({"RUN_NAME": ""}, "RUN_NAME is not set"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
    ],
    ids=["no-host", "show-fails", "no-run-name", "no-job"],
)
def test_slurm_fails_loudly(cluster, env, words):
    done = cluster.sbatch(**env)
    assert done.returncode == 2
    assert words in done.stderr
    assert not cluster.recorded("srun")


@pytest.mark.launch
@pytest.mark.parametrize("override", ["run.name=other", "run.output_root=/elsewhere", "checkpoint.resume=never"])
def test_slurm_refuses_what_it_sets_itself(cluster, override):
    done = cluster.sbatch(override)
    assert done.returncode == 2
    assert override in done.stderr
    assert not cluster.recorded("srun")


@pytest.mark.launch
@pytest.mark.parametrize(("restarts", "again"), [(None, True), ("2", True), ("3", False)])
def test_slurm_requeues_on_75_at_most_three_times(cluster, restarts, again):
    env = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    done = cluster.sbatch(FAKE_EXIT_JSON='{"code": 75, "rank": 0, "message": ""}', FAKE_CODE="1", **env)
    assert done.returncode == 75, done.stderr
    assert cluster.requeued is again
    assert ("sbatch it again" in done.stderr) is not again


@pytest.mark.launch
@pytest.mark.parametrize("code", [0, 1, 2, 65, 74])
def test_slurm_ends_with_the_true_code_and_no_requeue(cluster, code):
    message = json.dumps({"code": code, "rank": 1, "message": 'not "code": 75'})
    done = cluster.sbatch(FAKE_EXIT_JSON=message, FAKE_CODE="1" if code else "0")
    assert done.returncode == code, done.stderr
    assert not cluster.requeued


@pytest.mark.launch
def test_slurm_takes_no_old_exit_file_for_news(cluster):
    folder = cluster.work / "outputs" / "first"
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text('{"code": 75, "rank": 0, "message": ""}\n')
    done = cluster.sbatch(FAKE_CODE="1")
    assert done.returncode == 1, done.stderr
    assert not cluster.requeued


@pytest.mark.launch
def test_slurm_does_not_requeue_on_an_unreadable_exit_file(cluster):
    done = cluster.sbatch(FAKE_EXIT_JSON='{"code": 7', FAKE_CODE="1")
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    assert not cluster.requeued


TORCHRUN_C10D = """#!/usr/bin/env bash
words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --node-rank | --master-addr | --master-port) shift ;;
    *) words+=("$1") ;;
  esac
  shift
done
exec torchrun --rdzv-backend c10d --rdzv-endpoint "$HEAD" "${words[@]}"
"""
"""torchrun as it would be started with nodes that may come and go."""
UNPICKLED = """
import os, sys, traceback
def hook(event, args):
    if event == "pickle.find_class":
        frames = [f"{f.filename}:{f.name}" for f in traceback.extract_stack()]
        who = "rank" if "LOCAL_RANK" in os.environ else "agent"
        with open(os.environ["UNPICKLED"], "a") as file:
            print(who, *args, *[f for f in frames if "torch/distributed" in f], file=file)
sys.addaudithook(hook)
"""
"""Notes every class that is unpickled, and which code of torch.distributed did so."""


def _unpickled(file: Path) -> list[str]:
    """Return what torch.distributed has unpickled, but for DCP's plans, which ranks send each other (S15)."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [line for line in lines if "torch/distributed" in line and "torch/distributed/checkpoint" not in line]


@pytest.mark.launch
@pytest.mark.parametrize("static", some_in_full([True, False], [True]))
def test_two_nodes_train_together(tiny_run, cli_env, tmp_path, static):
    """S2, S15: nothing that comes through the port is unpickled; with torchrun's c10d rendezvous it is, as a control."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(UNPICKLED)
    unpickled = tmp_path / "unpickled.txt"
    env = cli_env | {
        "NNODES": "2", "HEAD": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1", "NPROC": "1",
        "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{cli_env['PYTHONPATH']}", "UNPICKLED": str(unpickled),
    }  # fmt: skip
    if not static:
        (tmp_path / "torchrun").write_text(TORCHRUN_C10D)
        (tmp_path / "torchrun").chmod(0o755)
        env["TORCHRUN"] = str(tmp_path / "torchrun")
    nodes = [
        subprocess.Popen(
            [str(LAUNCH / "multinode.sh"), "train", *tiny_run, "train.max_steps=2"], cwd=tmp_path,
            env=env | {"NODE": str(node)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    folder = tmp_path / "outputs" / "tiny"
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert [x["rank"] for x in summary["ranks"]] == [0, 1]
    assert bool(_unpickled(unpickled)) is not static, _unpickled(unpickled)


@pytest.mark.full
@pytest.mark.launch
def test_the_other_node_leaves_when_one_is_cut_off(tiny_run, cli_env, tmp_path):
    """R10: a node of which nothing is heard any more, its torchrun included, as behind a cut link."""
    env = cli_env | {"NNODES": "2", "HEAD": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1", "NPROC": "1"}
    run = [*tiny_run, "train.max_steps=5000", "launcher.timeout_seconds=30"]
    nodes = [
        subprocess.Popen(
            [str(LAUNCH / "multinode.sh"), "train", *run], cwd=tmp_path, env=env | {"NODE": str(node)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 3, nodes[0])
        for pid in (nodes[0].pid, *ranks_of(nodes[0])):
            os.kill(pid, signal.SIGSTOP)
        cut = time.monotonic()
        output = nodes[1].communicate(timeout=60)[0]
        assert time.monotonic() - cut < 40, output
        assert nodes[1].returncode == 1 and "rank 0" in output, output
    finally:
        for node in nodes:
            for pid in ranks_of(node):
                os.kill(pid, signal.SIGKILL)
            node.kill()


@pytest.mark.full
@pytest.mark.launch
def test_usr1_saves_and_queues_the_job_again(cluster, tiny_run, cli_env):
    """The heart of slurm.sbatch with the real torchrun: USR1 -> a checkpoint and code 75 -> scontrol requeue."""
    (cluster.bin / "torchrun").unlink()
    job = {
        **cli_env, "PATH": f"{cluster.bin}{os.pathsep}{cli_env['PATH']}", "RECORD": str(cluster.record),
        "FAKE_HOSTS": "127.0.0.1\n", "PORT": free_port(), "NPROC": "1", "RUN_NAME": "first", "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip
    overrides = [x for x in tiny_run if not x.startswith("run.name=")]
    process = subprocess.Popen(
        [str(LAUNCH / "slurm.sbatch"), *overrides, "train.max_steps=1000000", "train.compile=false"], cwd=cluster.work, env=job,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    folder = cluster.work / "outputs" / "first"
    try:
        deadline = time.monotonic() + 120
        while not _steps(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        if process.poll() is None:
            os.kill(int(cluster.recorded("pid.0")[0]), signal.SIGUSR1)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        if pids := cluster.recorded("pid.0"):
            subprocess.run(["kill", "-9", pids[0]], stderr=subprocess.DEVNULL, check=False)
    assert process.returncode == 75, output
    assert cluster.requeued
    assert list(folder.glob("checkpoints/step_*/COMPLETE"))


def _steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.is_file() else 0
