"""S21: code that another user planted where torch keeps compiled code is never run."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora.errors import SecurityError
from fsdp_qlora.files.home import COMPILED_PLACES
from fsdp_qlora.parallel.compile_cache import settle_compile_caches

COMPILE = """
import os, sys, torch
from fsdp_qlora.parallel.compile import compile_layers
from fsdp_qlora.parallel.compile_cache import settle_compile_caches
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "os.listdir", "os.scandir") else None)
class Layer(torch.nn.Module):
    def forward(self, x):
        return torch.sin(x) * 2
layer = Layer()
settle_compile_caches(os.environ)
compile_layers([layer])
layer(torch.ones(3))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
print([path for path in opened if sys.argv[1] in path])
"""


@pytest.mark.launch
def test_a_planted_cache_is_not_looked_into(tmp_path):
    shared = tmp_path / "shared-tmp"
    planted = shared / f"torchinductor_{getpass.getuser()}"  # what an attacker makes before its owner comes
    planted.mkdir(parents=True)
    planted.chmod(0o777)
    mine = tmp_path / "cache"
    env = {k: v for k, v in os.environ.items() if k not in COMPILED_PLACES}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(planted)], capture_output=True, text=True, timeout=200, check=False,
        env=env | {"TMPDIR": str(shared), "FSDP_QLORA_CACHE": str(mine)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    place, looks = done.stdout.splitlines()
    assert Path(place) == mine / "inductor"
    assert looks == "[]"
    assert Path(place).stat().st_mode & 0o777 == 0o700
    assert any(file.is_file() for file in Path(place).rglob("*")), "something was compiled"
    assert not any(planted.iterdir())


def test_an_inherited_folder_is_checked_alike(tmp_path):
    folder = tmp_path / "named"
    folder.mkdir(mode=0o700)
    env = dict.fromkeys(COMPILED_PLACES, str(folder))
    settle_compile_caches(env)
    assert set(env.values()) == {str(folder)}
    folder.chmod(0o777)
    with pytest.raises(SecurityError, match=r"TORCHINDUCTOR_CACHE_DIR.*others can write to"):
        settle_compile_caches(env)
    assert SecurityError.exit_code == 77


def test_a_parent_that_everybody_can_write_is_no_safe_place(tmp_path):
    outer = tmp_path / "outer"
    (outer / "mine").mkdir(parents=True, mode=0o700)
    outer.chmod(0o777)
    with pytest.raises(SecurityError, match="everybody can write to"):
        settle_compile_caches(dict.fromkeys(COMPILED_PLACES, str(outer / "mine")))
    outer.chmod(0o1777)  # as /tmp is: only owners replace what is theirs
    settle_compile_caches(dict.fromkeys(COMPILED_PLACES, str(outer / "mine")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(SecurityError, match="belongs to another user"):
        settle_compile_caches(dict.fromkeys(COMPILED_PLACES, str(folder)))


def test_without_a_home_it_is_a_folder_of_this_process_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.delenv("FSDP_QLORA_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "nowhere")
    env: dict[str, str] = {}
    settle_compile_caches(env)
    assert all(Path(folder).stat().st_mode & 0o777 == 0o700 for folder in env.values())
