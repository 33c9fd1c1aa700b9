"""One code for every accelerator: device types are named in one place; bitsandbytes' backend is found or refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from bitsandbytes import cextension

import fsdp_qlora
from fsdp_qlora.errors import PlanError
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
