"""What a process inherits: ignored signals stay ignored, half a set of torchrun's variables counts for nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fsdp_qlora.distributed.torchrun import forget_leftovers, is_rank, leftovers

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
        "import torch; from fsdp_qlora.distributed.process import Placement, process_group\n"
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
from fsdp_qlora.distributed.signals import StopSignals
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
        "from fsdp_qlora.distributed.signals import StopSignals\n"
        "with StopSignals(): pass\nprint('left')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=cli_env, capture_output=True, text=True, check=False)
    assert done.stdout == "left\n", done.stderr


_WHERE = (
    "from fsdp_qlora.files.module_path import leave_here, look_here_last; leave_here(); import sys; print(*sys.path, sep=',');"
    "look_here_last(); print(*sys.path, sep=',')"
)


@pytest.mark.parametrize("safe", ["", "1"])
def test_the_current_folder_comes_last_and_only_for_code_of_ones_own(cli_env, tmp_path, safe):
    """S9: however the process was started."""
    (tmp_path / "started.py").write_text(_WHERE)
    env = {**cli_env, "PYTHONSAFEPATH": safe}
    ways = [["-c", _WHERE], ["-m", "started"]] if not safe else [["-c", _WHERE]]
    for way in ways:
        done = subprocess.run([sys.executable, *way], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        before, after = (line.split(",") for line in done.stdout.splitlines())
        assert str(tmp_path) not in before and after == [*before, str(tmp_path)], way


def _plant(folder: Path) -> Path:
    """Plant modules in a folder, under every name that Python can be asked for; return what they write into."""
    (folder / "started.py").write_text("import sys; print(*sys.modules)")
    before = subprocess.run(  # Python itself takes these from the current folder before it comes to ours
        [sys.executable, "-m", "started"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split()
    canary = folder / "canary"
    note = f"open({str(canary)!r}, 'a').write(__name__ + '\\n')\n"
    installed = metadata.packages_distributions().keys() - {"fsdp_qlora"}
    for name in sys.stdlib_module_names | installed | {"flash_attn", "kernels", "triton", "apex"}:
        if name not in before and name.isidentifier():
            (folder / f"{name}.py").write_text(f"{note}raise ImportError('planted')\n")
    for package in ("hydra_plugins/evil.py", "entry_of_torch.py"):
        (folder / package).parent.mkdir(exist_ok=True)
        (folder / package).write_text(f"{note}def go(): pass\n")
    (folder / "evil-1.dist-info").mkdir()
    (folder / "evil-1.dist-info/METADATA").write_text("Name: evil\nVersion: 1\n")
    (folder / "evil-1.dist-info/entry_points.txt").write_text("[torch.backends]\nx = entry_of_torch:go\n")
    return canary


_WAYS = {
    "doctor": ["-m", "fsdp_qlora", "doctor"],
    "a sweep": ["-m", "fsdp_qlora", "plan", "model.name=./nowhere", "run.seed=1,2", "--multirun"],
    "script": [str(Path(sys.executable).parent / "fsdp-qlora"), "plan", "model.name=./nowhere"],
    "pip": ["-m", "fsdp_qlora", "prepare", "experiment=quickstart"],
    "ranks": ["-m", "fsdp_qlora", "train", "model.name=./nowhere", "data.train=./rows", "launcher.nproc_per_node=2"],
}


@pytest.mark.parametrize(
    "way", [way if way == "doctor" else pytest.param(way, marks=pytest.mark.full) for way in _WAYS]
)
def test_nothing_that_lies_in_the_current_folder_is_run(cli_env, tmp_path, way):
    """S9: neither modules that hide others nor those that libraries look for by themselves."""
    canary = _plant(tmp_path)
    env = {**cli_env, "FSDP_QLORA_CACHE": str(tmp_path / "cache"), "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    done = subprocess.run(
        [sys.executable, *_WAYS[way]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert not canary.exists(), canary.read_text()
    assert "planted" not in done.stderr and (way == "doctor") == (done.returncode == 0), done.stderr


def test_a_current_folder_that_is_gone_is_one_line(cli_env, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m fsdp_qlora doctor"
    done = subprocess.run(["sh", "-c", shell], env=cli_env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 74 and "the current folder" in done.stderr and "Traceback" not in done.stderr
