"""What a process inherits: ignored signals stay ignored, half a set of torchrun's variables counts for nothing."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fsdp_qlora.dist.torchrun import forget_leftovers, is_rank, leftovers

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("extra", [{}, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}])
def test_a_complete_set_makes_a_rank(extra):
    env = {**WHOLE, **extra, "TORCHELASTIC_RESTART_COUNT": "1"}
    before = dict(env)
    assert is_rank(env) and forget_leftovers(env, ["MINE"]) == "" and env == before


HALF = {
    "an address": {"MASTER_ADDR": "10.0.0.1"},
    "a size": {"WORLD_SIZE": "2"},
    "an empty address": {**WHOLE, "MASTER_ADDR": ""},
    "no port": {k: v for k, v in WHOLE.items() if k != "MASTER_PORT"},
    "a port that is none": {**WHOLE, "MASTER_PORT": "auto"},
    "a rank that is none": {**WHOLE, "RANK": "$SLURM_PROCID"},
    "a negative rank": {**WHOLE, "RANK": "-1"},
    "a rank beyond the size": {**WHOLE, "RANK": "2"},
    "a local rank alone": {"LOCAL_RANK": "0"},
    "a local rank that is none": {**WHOLE, "LOCAL_RANK": ""},
}


@pytest.mark.parametrize("case", HALF)
def test_half_a_set_is_forgotten_with_a_note(case):
    env = {**HALF[case], "TORCHELASTIC_RESTART_COUNT": "2", "MINE": "x", "PATH": "/bin"}
    note = leftovers(env)
    assert not is_rank(env) and "ignored" in note and all(name in note for name in HALF[case])
    assert forget_leftovers(env, ["MINE"]) == note and env == {"PATH": "/bin"}
    assert leftovers(env) == "" == forget_leftovers(env)


@pytest.mark.parametrize("case", ["an address", "no port", "a rank that is none"])
def test_the_library_opens_a_world_of_its_own_beside_leftovers(cli_env, case):
    code = (
        "import torch; from fsdp_qlora.dist.process import Placement, process_group\n"
        "placement = Placement.from_env()\n"
        "with process_group(torch.device('cpu'), placement, 5) as group: print(placement.world_size, group.size())"
    )
    env = {**cli_env, **HALF[case]}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1 1\n"), done.stderr
    assert "ignored" in done.stderr and "Traceback" not in done.stderr


_STOP = """
import os, signal, sys
from fsdp_qlora.dist.signals import StopSignals
with StopSignals() as stop:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
        print(signal.Signals(number).name, stop.requested)
        stop.received = None
print(*(signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGHUP, signal.SIGINT)))
"""


@pytest.mark.parametrize("ignored", [(signal.SIGHUP,), (signal.SIGHUP, signal.SIGINT), (signal.SIGUSR1,), ()])
def test_an_inherited_ignored_signal_stays_ignored(cli_env, ignored):
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)

    def ignore() -> None:
        for number in numbers:  # these tests may themselves run under nohup
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    done = subprocess.run(
        [sys.executable, "-c", _STOP], env=cli_env, capture_output=True, text=True, preexec_fn=ignore, check=False,
    )  # fmt: skip
    expected = [f"{n.name} {n not in ignored}" for n in numbers]
    expected.append(f"{signal.SIGHUP in ignored} {signal.SIGINT in ignored}")
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_signal_handled_in_c_is_no_obstacle(cli_env):
    code = (
        "import ctypes, signal; libc = ctypes.CDLL(None)\n"
        "handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)\n"
        "libc.signal(int(signal.SIGUSR1), handler)\n"
        "from fsdp_qlora.dist.signals import StopSignals\n"
        "with StopSignals(): pass\nprint('left')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=cli_env, capture_output=True, text=True, check=False)
    assert done.stdout == "left\n", done.stderr


_WHERE = (
    "from fsdp_qlora.cli.module_path import look_here_last; look_here_last(); import sys; print(*sys.path, sep='\\n')"
)


@pytest.mark.parametrize("safe", ["", "1"])
def test_the_current_folder_comes_last_however_the_process_was_started(cli_env, tmp_path, safe):
    (tmp_path / "started.py").write_text(_WHERE)
    env = {**cli_env, "PYTHONSAFEPATH": safe}
    ways = [["-c", _WHERE], ["-m", "started"]] if not safe else [["-c", _WHERE]]
    for way in ways:
        done = subprocess.run([sys.executable, *way], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        path = done.stdout.splitlines()
        assert path.index(str(tmp_path)) == len(path) - 1, (way, path)


def test_modules_of_the_current_folder_hide_none_of_ours(cli_env, tmp_path):
    """The package is started by -m here, as torchrun does; `doctor` imports what a run does."""
    for name in ("datasets", "tokenize", "json", "peft", "hydra", "yaml", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = subprocess.run(
        [sys.executable, "-m", "fsdp_qlora", "doctor"], cwd=tmp_path, env=cli_env, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "cores" in done.stdout, done.stderr


def test_a_current_folder_that_is_gone_is_one_line(cli_env, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m fsdp_qlora doctor"
    done = subprocess.run(["sh", "-c", shell], env=cli_env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 74 and "the current folder" in done.stderr and "Traceback" not in done.stderr
