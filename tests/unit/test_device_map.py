"""`generate.device_map`: what goes with it, and that it is one process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fsdp_qlora.cli.launcher import ranks_to_start
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.inference.spread import describe, main_device, memory_limits
from fsdp_qlora.quant.formats.plain import bitsandbytes_config
from tests.conftest import ROOT

WRONG: dict[str, dict[str, Any]] = {
    "generate.max_memory: is about generate.device_map": {"generate": {"max_memory": {"cpu": "1GiB"}}},
    "generate.offload_fp32: is about generate.device_map": {"generate": {"offload_fp32": True}},
    "generate.offload_folder: is about generate.device_map": {"generate": {"offload_folder": "x"}},
    "generate.max_memory: 'gpu' is no device": {"generate": {"device_map": "auto", "max_memory": {"gpu": "1GiB"}}},
    "generate.max_memory: '20' is not an amount": {"generate": {"device_map": "auto", "max_memory": {"0": "20"}}},
    "generate.device_map: one process": {"generate": {"device_map": "auto"}, "launcher": {"nproc_per_node": 2}},
    "quant.overrides: plain transformers": {"generate": {"device_map": "auto"}, "quant": {"overrides": {"*": "int8"}}},
    "model.add_tokens: plain transformers": {"generate": {"device_map": "auto"}, "model": {"add_tokens": ["<x>"]}},
    "generate.offload_fp32: is about quantized layers": {
        "generate": {"device_map": "auto", "offload_fp32": True}, "quant": {"name": "none", "double_quant": False},
    },
}  # fmt: skip


def test_what_does_not_go_together_is_said():
    for said, groups in WRONG.items():
        assert [line for line in failures(from_dict(groups)) if line.startswith(said)], said
    right = from_dict({"generate": {"device_map": "balanced", "max_memory": {0: "20GiB", "cpu": "60 GB"}}})
    assert not [line for line in failures(right) if line.startswith("generate.")]
    assert ranks_to_start(right) == 1
    limits = memory_limits({"0": 5, "cpu": 7}, torch.device("cuda", 0))
    assert limits == {0: 5, "cpu": 7} and memory_limits({"0": 5, "cpu": 7}, torch.device("cpu")) == {"cpu": 7}
    assert main_device({"a": "1", "b": "disk"}, torch.device("cuda", 0)) == torch.device("cuda", 1)
    assert main_device({"a": "cpu", "b": "disk"}, torch.device("cpu")) == torch.device("cpu")
    packed = bitsandbytes_config(from_dict({}).quant, torch.bfloat16, True)
    assert packed is not None and packed.load_in_4bit and packed.llm_int8_enable_fp32_cpu_offload
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(4, 4, bias=False))
    assert describe(model, {"0": "cpu", "1": "disk"}) == "0.0 MB on the CPU, 0.0 MB on disk"


@pytest.mark.full
@pytest.mark.launch
def test_it_is_refused_under_torchrun_before_torch_is_imported(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
           "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # fmt: skip
    command = [sys.executable, "-X", "importtime", "-m", "fsdp_qlora", "generate", "generate.device_map=auto",
               "model.name=x/y", "prompt=Who?"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 2 and "generate.device_map: one process drives all devices" in done.stderr
    assert "| torch\n" not in done.stderr
