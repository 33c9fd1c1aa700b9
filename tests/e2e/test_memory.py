"""What a rank holds after `prepare`, counted from outside: every live tensor of the process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.launch, pytest.mark.full]

COUNT = """
import gc, json, os, sys
import torch
from torch.distributed.tensor import DTensor
from fsdp_qlora import from_dict, prepare
prepared = prepare(from_dict({"model": {"name": sys.argv[1]}, "launcher": {"device": "cpu"}}))
gc.collect()
storages = {}
for thing in gc.get_objects():
    if isinstance(thing, torch.Tensor):
        tensors = [thing.to_local()] if isinstance(thing, DTensor) else [thing]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
with open(f"{sys.argv[2]}.{os.environ.get('RANK', '0')}", "w") as out:
    json.dump(sum(storages.values()), out)
prepared.close()
"""


def test_two_ranks_hold_half_each(real_model, cli_env, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"held{ranks}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run(
            [*command, str(script), str(real_model), str(out)], env=cli_env, cwd=tmp_path, check=True, timeout=120
        )
        found[ranks] = [json.loads((tmp_path / f"held{ranks}.{r}").read_text()) for r in range(ranks)]
    assert found[1][0] > 100e6
    assert max(found[2]) <= 0.55 * found[1][0], found
