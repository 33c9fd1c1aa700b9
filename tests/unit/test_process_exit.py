"""A rank's end: the true code, word of it, and nothing left to the interpreter's finalization."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_RANK = """
import atexit, os
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.run.exit import guarded
atexit.register(os.abort)  # as a thread of gloo's does now and then
def work():
    print("worked")
    {end}
raise SystemExit(guarded(work))
"""


@pytest.mark.parametrize(("end", "code"), [("return 0", 0), ("return 75", 75), ("raise ConfigError('no')", 2)])
def test_a_rank_leaves_before_finalization_can_abort_it(cli_env, tmp_path, end, code):
    told = tmp_path / "exit.json"
    env = {**cli_env, "RANK": "1", "WORLD_SIZE": "2", "FSDP_QLORA_EXIT_FILE": str(told)}
    command = [sys.executable, "-c", _RANK.format(end=end)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (code, "worked\n"), result.stderr
    assert json.loads(Path(f"{told}.0.1").read_text())["code"] == code
