"""S1: on one machine no store of a run listens on a port, where others could write what the run would unpickle."""

from __future__ import annotations

import signal
import socket
import struct
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
