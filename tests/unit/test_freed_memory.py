"""What a rank on a CPU keeps of freed memory: each case in a process of its own, for it is a setting of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from contextlib import nullcontext
from fsdp_qlora.distributed.memory import return_freed_memory, settle_host_memory, spared_memory
def resident():
    return next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
settle_host_memory(sys.argv[1] != "return")
before = resident()
with spared_memory() if sys.argv[1] == "spare" else nullcontext():
    blocks = [torch.ones(int(sys.argv[2]) * 2**18) for _ in range(8)]
    last = torch.ones(10)  # above them in the heap
    del blocks
    kept = resident() - before
return_freed_memory()
print(kept, resident() - before)
"""


PRODUCTS = """
import random, torch
from fsdp_qlora.distributed.memory import settle_host_memory
def resident():
    return next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
settle_host_memory(True)
torch.set_num_threads(1)
weights, x = [torch.randn(n, 576).bfloat16() for n in (192, 576, 1536)], torch.randn(448, 576).bfloat16()
for turn in range(90):
    tokens = random.Random(turn).randint(50, 448)
    for weight in weights:
        y = x[:tokens] @ weight.t()
        y @ weight
    if turn == 5:
        before = resident()
print(resident() - before)
"""


def run(script: str, *arguments: str) -> list[int]:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [int(word) for word in done.stdout.split()]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")


@pytest.mark.parametrize(
    ("word", "size", "low", "high"),
    [("keep", 64, 480, 560), ("spare", 64, -20, 20), ("spare", 24, 180, 260), ("return", 24, -20, 20)],
)
def test_eight_freed_blocks(word, size, low, high):
    kept, after = run(SCRIPT, word, str(size))
    assert low < kept < high
    assert after < 20


def test_products_of_many_sizes_do_not_pile_up():
    (grown,) = run(PRODUCTS)
    assert grown < 120  # 250 with the caches that oneDNN and torch have by default
