"""S1: on one machine no store of a run listens on a port, where others could write what the run would unpickle."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.processes import ranks_of, start, wait_for_step

pytestmark = pytest.mark.launch

_LISTENS = "0A"


def _listening(pid: int) -> list[tuple[str, int]]:
    """Return (address as the kernel writes it, port) of each TCP socket of a process that listens."""
    own = {link for file in Path(f"/proc/{pid}/fd").iterdir() if (link := _target(file)).startswith("socket:")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            (
                _,
                local,
                _,
                state,
                *_,
            ) = line.split()
            inode = line.split()[9]
            if state == _LISTENS and f"socket:[{inode}]" in own:
                address, port = local.split(":")
                found.append((address, int(port, 16)))
    return found


def _target(file: Path) -> str:
    try:
        return str(file.readlink())
    except OSError:  # closed meanwhile
        return ""


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _is_store(port: int) -> bool:
    """Whether a TCPStore answers on a port: it is asked as its own client asks, by a check and a ping."""
    nonce = 4711
    with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
        client.sendall(struct.pack("=BIBI", 0, 0x3C85F7CE, 13, nonce))
        try:
            return client.recv(4) == struct.pack("=I", nonce)
        except OSError:
            return False


def test_a_store_would_be_seen():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    assert _is_store(store.port)


LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def test_nothing_of_a_run_on_one_machine_can_be_written_into(cli_env, tiny_run, tmp_path):
    run = ["train", *tiny_run, "train.max_steps=5000", "launcher.nproc_per_node=2", "launcher.timeout_seconds=60"]
    process = start(run, cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 2, process)
    ranks = ranks_of(process)
    agents = _children(process.pid)
    assert len(ranks) == 2 and agents
    try:
        assert [_listening(pid) for pid in (process.pid, *agents)] == [[]] * (1 + len(agents))
        sockets = [found for pid in ranks for found in _listening(pid)]
        assert all(address in LOOPBACK for address, _ in sockets), sockets
        # what does listen (gloo's pairs) is no store that an attacker could put a pickle into
        assert not any(_is_store(port) for _, port in sockets)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out[-300:] + err[-1500:]


ATTACK = """
import pickle, socket, struct, sys

class Canary:
    def __reduce__(self):
        return (open, (sys.argv[1], "w"))

load = pickle.dumps(Canary())
key = b"default_pg/0//store_based_barrier_key:1"
payloads = [
    load,
    struct.pack(">I", len(load)) + load,  # multiprocessing's framing
    struct.pack("<Q", len(load)) + load,
    struct.pack("=BIB", 0, 0x3C85F7CE, 0) + struct.pack("=Q", len(key)) + key + struct.pack("=Q", len(load)) + load,
    b"\\0" * 4096,
]
reached = 0
for port in map(int, sys.argv[2:]):
    for payload in payloads:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
                reached += 1
                client.sendall(payload)
                client.settimeout(0.3)
                client.recv(64)
        except OSError:
            pass
print(reached)
"""
"""What another user of the machine sends to each port: pickles, as TCPStore and multiprocessing would frame them."""
PYTHON = "/usr/bin/python3"
"""One that another user may run."""


def _as_nobody(before: list[str], canary: Path, ports: list[int]) -> int:
    """Attack the ports as a user without rights; return how many connections were accepted."""
    who = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    command = [*before, *who, PYTHON, "-c", ATTACK, str(canary), *map(str, ports)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.full
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv") or not Path(PYTHON).exists(), reason="takes another user's place"
)
def test_another_user_makes_no_rank_run_code(cli_env, tiny_run, tmp_path):
    run = ["train", *tiny_run, "train.max_steps=5000", "launcher.nproc_per_node=2", "launcher.timeout_seconds=60"]
    process = start(run, cli_env, tmp_path)
    metrics, canary = tmp_path / "outputs/tiny/metrics.jsonl", tmp_path / "canary"
    wait_for_step(metrics, 2, process)
    try:
        ports = sorted({port for pid in ranks_of(process) for _, port in _listening(pid)})
        if ports:
            assert _as_nobody([], canary, ports) > 0  # gloo's pairs do accept connections
        if shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0:
            assert _as_nobody(["unshare", "-n"], canary, ports or [1]) == 0  # from another network namespace
        steps = len(metrics.read_text().splitlines())
        wait_for_step(metrics, steps + 3, process)  # it trains on, undisturbed
        assert not canary.exists()
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out[-300:] + err[-1500:]
