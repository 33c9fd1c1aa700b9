"""The bundle for GPU machines without network: it is small, complete, and its tests run from it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 40 * 2**20
NO_NETWORK_EXIT_CODE = 3
ABSENT = ("datasets", "pyarrow", "wandb")
"""What the tests on the GPU machine must do without."""


@pytest.mark.full
@pytest.mark.timeout(450)
@pytest.mark.launch
def test_the_bundle_runs_alone(tmp_path):
    bundle = tmp_path / "bundle"
    built = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "gpu_bundle.py"), "--out", str(bundle)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    if built.returncode == NO_NETWORK_EXIT_CODE:
        pytest.skip(f"the packages cannot be downloaded: {built.stderr.strip()}")
    assert built.returncode == 0, built.stderr
    assert "MiB of 40" in built.stdout
    assert sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) < LIMIT_BYTES
    libraries = {file.name for file in bundle.rglob("libbitsandbytes_*.so")}
    assert "libbitsandbytes_cpu.so" in libraries
    assert "libbitsandbytes_cuda130.so" in libraries
    assert all(name.startswith(("libbitsandbytes_cpu", "libbitsandbytes_cuda13")) for name in libraries)

    for name in ABSENT:  # first on the path of what follows the bundle: as if they were not installed
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f"raise ImportError('{name} is not on this machine')\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_QLORA_", "PYTEST_", "BUNDLE"))}
    done = subprocess.run(
        ["bash", str(bundle / "tests" / "gpu" / "run.sh"), "-q"], cwd=tmp_path, capture_output=True, text=True,
        timeout=220, check=False,
        env=environment | {"DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "absent")},
    )  # fmt: skip
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    for package in ("site/bitsandbytes", "site/peft", "fsdp_qlora"):
        assert f"from {bundle / package}\n" in shown, shown
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\b\d+ passed\b", last), shown
    assert not re.search(r"skipped|failed|error|deselected", last), shown
    assert "peak memory" in shown


@pytest.mark.launch
def test_the_bundle_replaces_no_folder_of_ours(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "gpu_bundle.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is no bundle" in done.stderr
    assert (tmp_path / "thesis.txt").is_file()


@pytest.mark.launch
@pytest.mark.full
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"BUNDLE": "no-such-folder"}, "no folder site"),
        ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "no cuda device"),
    ],
    ids=["bundle", "device"],
)
def test_what_is_missing_is_no_quiet_pass(setting, words, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "BUNDLE"} | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "gpu" / "run.sh")], cwd=tmp_path, env=environment | setting,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
