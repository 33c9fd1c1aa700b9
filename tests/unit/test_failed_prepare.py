"""A `prepare` that fails leaves no process group behind: a notebook can try again."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch.distributed as dist
from fsdp_qlora import prepare
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import FsdpQloraError

for _ in range(2):
    try:
        prepare(from_dict({"model": {"name": "./no-such-folder"}, "launcher": {"device": "cpu"}}))
    except FsdpQloraError as error:
        print("refused", dist.is_initialized(), "no-such-folder" in str(error))
"""


def test_a_failed_prepare_can_be_tried_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines() == ["refused False True"] * 2, done.stderr[-2000:]
