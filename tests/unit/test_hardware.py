"""One code for every accelerator: device types are named in one place; bitsandbytes' backend is found or refused."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import cextension

import fsdp_qlora
from fsdp_qlora.distributed import process
from fsdp_qlora.distributed.memory import memory_of
from fsdp_qlora.errors import PlanError
from fsdp_qlora.parallel import compile as compile_module
from fsdp_qlora.parallel.compile import can_compile
from fsdp_qlora.quant.backend import bitsandbytes_backend

ROOT = Path(fsdp_qlora.__file__).parent
ALLOWED = {"distributed/process.py", "config/schema.py"}
"""Where a device type is chosen, and where a person may ask for one."""


def _names_a_vendor(file: Path) -> list[int]:
    """Return the lines that name CUDA as a device: a string ``cuda`` or ``cuda:0``, or ``torch.cuda``."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] == "cuda"
        module = isinstance(node, ast.Attribute) and node.attr == "cuda"
        if text or module:
            found.append(node.lineno)
    return found


def test_no_module_but_those_that_choose_names_cuda():
    files = {file.relative_to(ROOT).as_posix(): _names_a_vendor(file) for file in sorted(ROOT.rglob("*.py"))}
    assert len(files) > 100
    assert {name for name, lines in files.items() if lines} == ALLOWED


def test_the_backend_is_named():
    assert bitsandbytes_backend(torch.device("cpu")).endswith(" (CPU)")


def test_no_backend_is_refused_with_what_to_do(monkeypatch):
    with pytest.raises(PlanError, match=r"no backend for vulkan.*cpu, cuda.*Set quant=none"):
        bitsandbytes_backend(torch.device("vulkan"))
    missing = cextension.ErrorHandlerMockBNBNativeLibrary("not found")
    monkeypatch.setattr(cextension, "lib", missing)
    monkeypatch.setattr(cextension, "BNB_BACKEND", "ROCm")
    with pytest.raises(PlanError, match=r"could not load its ROCm library.*quant=none"):
        bitsandbytes_backend(torch.device("cuda"))
    assert "XPU, without its library" in bitsandbytes_backend(torch.device("xpu"))


def test_a_rank_plans_with_what_is_free_on_its_card(monkeypatch):
    card = SimpleNamespace(
        mem_get_info=lambda device: (10_000, 80_000),
        memory_reserved=lambda device: 3_000,
        memory_allocated=lambda device: 1_000,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    assert memory_of(torch.device("cuda", 0), 8) == 12_000  # free, and what the allocator holds unused


@pytest.mark.parametrize("given", [None, *process._ALLOCATOR_VARIABLES])
def test_segments_expand_unless_the_allocator_was_set_up(monkeypatch, given):
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    for name in process._ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    process.use_device(torch.device("cuda", 0))
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        None: "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
    }.get(given)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


@pytest.mark.parametrize(
    ("triton", "compiler", "capability", "can"),
    [
        (True, "gcc", (9, 0), True),
        (True, "gcc", (7, 0), True),
        (True, "gcc", (6, 1), False),  # Pascal
        (True, None, (9, 0), False),
        (False, "gcc", (9, 0), False),
        (True, "gcc", {"architecture": 1}, True),  # Intel's form
    ],
)
def test_compiling_for_an_accelerator_needs_triton_a_compiler_and_its_capability(
    monkeypatch, triton, compiler, capability, can
):
    card = SimpleNamespace(get_device_capability=lambda device: capability)
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    monkeypatch.setattr(compile_module.importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: name if name == compiler else None)
    assert can_compile(torch.device("cuda", 0)) == can
