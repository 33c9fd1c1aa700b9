"""Freed memory is kept, or given back to the kernel: each in a process of its own, for it is a setting of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from fsdp_qlora.distributed.process import keep_freed_memory
def resident():
    return next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
keep_freed_memory(sys.argv[1] == "keep")
before = resident()
blocks = [torch.ones(16 * 2**20) for _ in range(3)]
last = torch.ones(10)  # above them in the heap
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(("word", "low", "high"), [("keep", 180, 260), ("return", -20, 20)])
def test_freed_blocks_of_64_mib(word, low, high):
    done = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, timeout=120, check=True)
    assert low < int(done.stdout) < high
