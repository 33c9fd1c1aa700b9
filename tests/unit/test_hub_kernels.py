"""S23: no compiled code is downloaded from the hub unless code of others is trusted."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fsdp_qlora
from fsdp_qlora.files.hub_kernels import _not_importable
from tests.families import MOE, SMALL

_SETTINGS = {
    "llama": {"model_type": "llama", **SMALL},
    "gpt_oss": {"model_type": "gpt_oss", **SMALL, **MOE},
    "llama that names a kernel": {"model_type": "llama", **SMALL, "attn_implementation": "kernels-community/evil"},
    "gemma3 that names a kernel": {
        "model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"],
        "text_config": {"model_type": "gemma3_text", **SMALL, "attn_implementation": "kernels-community/evil"},
    },
}  # fmt: skip

_KERNELS = """
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return lambda layer: layer
def get_kernel(name, **kwargs):
    open({canary!r}, "a").write(name + "\\n")
    raise FileNotFoundError(name)
def use_kernel_forward_from_hub(name): return lambda layer: layer
def use_kernelized_func(*names): return lambda layer: layer
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Anything
"""
_BUILD = """
import sys
from pathlib import Path
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available(), "transformers must take this package for the real one"
import torch
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.decide import attentions_for, replace_attention, skeleton
asked, trust, folder = sys.argv[1], sys.argv[2] == "trust", Path(sys.argv[3])
config = from_dict({"model": {"name": str(folder), "attn_implementation": asked, "trust_remote_code": trust}})
try:
    for attention in attentions_for(config, torch.device("cuda"), folder):
        skeleton(replace_attention(config, attention), folder)
except FsdpQloraError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def build(tmp_path, cli_env):
    """Return a function that builds a model where the package `kernels` is installed; and its canary."""
    canary, site = tmp_path / "canary", tmp_path / "site"
    (site / "kernels/layer").mkdir(parents=True)
    (site / "kernels/__init__.py").write_text(_KERNELS.format(canary=str(canary)))
    for name in ("layer/__init__", "layer/mode"):
        (site / f"kernels/{name}.py").write_text("class Mode: INFERENCE = TRAINING = 0\n")
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    env = {**cli_env, "PYTHONPATH": f"{cli_env['PYTHONPATH']}{os.pathsep}{site}"}

    def run(kind: str, asked: str, trust: str = "") -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(_SETTINGS[kind]))
        command = [sys.executable, "-c", _BUILD, asked, trust, str(folder)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    return run, canary


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_flash_attention_from_the_hub_is_refused(build, kind):
    run, canary = build
    done = run(kind, "flash_attention_2")
    assert done.returncode == 2 and "model.trust_remote_code=true" in done.stdout, done.stderr
    assert not canary.exists()
    run(kind, "flash_attention_2", "trust")
    assert "kernels-community/" in canary.read_text()


@pytest.mark.full
@pytest.mark.parametrize("kind", _SETTINGS)
def test_auto_takes_nothing_from_the_hub(build, kind):
    run, canary = build
    done = run(kind, "auto")
    assert done.returncode == 0 and not canary.exists(), done.stderr


def test_bitsandbytes_is_imported_without_the_package_kernels():
    with _not_importable("json"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("json")
    assert importlib.import_module("json") is json


def test_no_package_imports_bitsandbytes_in_another_way():
    for file in Path(fsdp_qlora.__file__).parent.rglob("*.py"):
        if file.name != "hub_kernels.py" and re.search(r"^(from|import) (peft|bitsandbytes)\b", file.read_text(), re.M):
            assert "import hub_kernels" in (file.parent / "__init__.py").read_text() or file.parent.name == "formats", (
                file
            )
    assert "import hub_kernels" in (Path(fsdp_qlora.__file__).parent / "quant" / "__init__.py").read_text()
