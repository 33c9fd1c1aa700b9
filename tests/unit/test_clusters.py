"""Clusters: no home folder, file systems that lack operations, limits of the kernel, services that do not answer."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from fsdp_qlora.files.home import settle_without_home
from fsdp_qlora.files.write import sync, write_first
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.track.tracker import Beside, JsonLines, Tracker
from fsdp_qlora.track.unwritten import Unwritten


def _python(cli_env, code: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    whole = {k: v for k, v in {**cli_env, **env}.items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=whole, capture_output=True, text=True, timeout=100, check=False
    )


_CACHE = (
    "from fsdp_qlora.run.exit import guarded; from fsdp_qlora.files.home import cache_folder\n"
    "raise SystemExit(guarded(lambda: print(cache_folder()) or 0))"
)
HOMES = {
    "no folder": ("/dev/null", None, 2),
    "not there": ("/nonexistent/home", None, 2),
    "relative": ("home", None, 2),
    "a cache in no home": ("/dev/null", "~/cache", 2),
    "a cache that is a file": ("/tmp", "/dev/null", 74),
    "a cache in a file": ("/tmp", "/etc/hostname/cache", 74),
    "a cache elsewhere": ("/dev/null", "/tmp/fsdp_qlora_cache", 0),
    "a home": ("/tmp", None, 0),
}


@pytest.mark.parametrize("case", HOMES)
def test_without_a_place_for_the_cache_one_line_names_the_variable(cli_env, case):
    home, cache, code = HOMES[case]
    done = _python(cli_env, _CACHE, HOME=home, FSDP_QLORA_CACHE=cache)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("fsdp-qlora: FSDP_QLORA_CACHE: ")
    else:
        assert done.stdout.strip() == (cache or f"{home}/.cache/fsdp_qlora")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without an entry in passwd")
def test_a_user_without_an_entry_in_passwd(cli_env):
    become = "import os; os.setgid(54321); os.setuid(54321)"
    code = _CACHE.replace("\n", f"\n{become}\n", 1)
    done = _python(cli_env, code, HOME=None, FSDP_QLORA_CACHE=None, USER=None, LOGNAME=None)
    assert done.returncode == 2 and "FSDP_QLORA_CACHE" in done.stderr and "Traceback" not in done.stderr
    code = f"import getpass; from fsdp_qlora.cli.quiet import quieten\n{become}; quieten(); print(getpass.getuser())"
    done = _python(cli_env, code, HOME=None, USER=None, LOGNAME=None)
    assert done.stdout == "uid54321\n", done.stderr


def test_other_libraries_get_a_place_only_where_there_is_no_home(cli_env):
    code = "from fsdp_qlora.cli.quiet import quieten; quieten(); import os; print(os.environ.get('HF_HOME'))"
    done = [
        _python(cli_env, code, HOME=home, HF_HOME=None, FSDP_QLORA_CACHE="/tmp/c") for home in ("/dev/null", "/tmp")
    ]
    assert [d.stdout for d in done] == ["/tmp/c/huggingface\n", "None\n"]
    env = {"HF_HOME": "/mine"}
    settle_without_home(env)
    assert env["HF_HOME"] == "/mine"


def _lacks(number: int):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_the_first_one_writes_also_without_links(tmp_path, number):
    file = tmp_path / "exit.json"
    assert write_first(file, "first", _lacks(number))
    assert not write_first(file, "second", _lacks(number))
    assert not write_first(file, "third")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError):
        write_first(tmp_path / "other", "x", _lacks(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_what_cannot_be_synced_is_left_to_the_kernel(tmp_path, number):
    sync(tmp_path, _lacks(number))
    sync(tmp_path)
    for bad in (errno.EIO, errno.ENOSPC):
        with pytest.raises(OSError):
            sync(tmp_path, _lacks(bad))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_a_run_warns_and_goes_on(tmp_path, capsys, number):
    folder = RunFolder(str(tmp_path), "r")
    folder.create()
    folder.lock(_lacks(number))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "does not support locks" in err and str(folder.path) in err
    folder.begin({"a": 1})
    folder.unlock()


@pytest.mark.parametrize(
    "name", ["ENAMETOOLONG", "EMFILE", "ENOTDIR", "ENOLCK", "ENOTSUP", "EAGAIN", "EFBIG", "ESTALE"]
)
def test_what_the_system_refuses_is_one_line(cli_env, name):
    code = (
        "import errno, os; from fsdp_qlora.run.exit import guarded\n"
        f"def work(): raise OSError(errno.{name}, os.strerror(errno.{name}), '/the/file')\n"
        "raise SystemExit(guarded(work))"
    )
    done = _python(cli_env, code)
    assert done.returncode == 74 and done.stderr.count("\n") == 1 and "/the/file" in done.stderr


class _Broken:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.calls += 1
        raise BrokenPipeError("the service is gone")

    def rewind(self, step: int) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def test_a_sink_that_fails_is_reported_once_and_the_truth_goes_on(tmp_path, capsys):
    broken = _Broken()
    tracker = Tracker([JsonLines(tmp_path / "metrics.jsonl", 0, Unwritten()), Beside(broken, "track=wandb")])
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.rewind(2)
    tracker.close()
    err = capsys.readouterr().err
    assert broken.calls == 1 and err.count("\n") == 1 and "track=wandb failed" in err and "the service is gone" in err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


_WANDB = """
import sys
from pathlib import Path
from fsdp_qlora.config.schema import TrackSettings
from fsdp_qlora.track.sink import Ended, State
from fsdp_qlora.track.wandb import open_wandb
sink = open_wandb(Path(sys.path.pop()), "r", TrackSettings({"wandb": True}), {})
sink.log(1, {"loss": 1.0}); sink.end(Ended(State.FINISHED))
print(sink._run.settings.mode)
"""
KEYS = {
    "none": ({}, 0),
    "empty": ({"WANDB_API_KEY": ""}, 0),
    "blank": ({"WANDB_API_KEY": "  "}, 0),
    "too short": ({"WANDB_API_KEY": "abc"}, 1),
    "with a line feed": ({"WANDB_API_KEY": "0" * 40 + "\n"}, 1),
    "online without a key": ({"WANDB_MODE": "online"}, 1),
    "no answer": ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}, 1),
}


@pytest.mark.parametrize("case", [*list(KEYS)[:4], *(pytest.param(k, marks=pytest.mark.full) for k in list(KEYS)[4:])])
def test_wandb_is_offline_with_at_most_one_warning(cli_env, tmp_path, case):
    env, warnings = KEYS[case]
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n{_WANDB}"
    done = _python(cli_env, code, HOME=str(tmp_path), **env)
    assert done.returncode == 0 and done.stdout.strip() == "offline", done.stderr
    assert done.stderr.count("track=wandb: ") == warnings and "Traceback" not in done.stderr
    assert "logged offline" in done.stderr or not warnings
