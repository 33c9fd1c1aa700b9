"""The GGUF round trip: llama.cpp computes with an exported file what the trained model computes.

The runtime is the wheel xllamacpp, a build of llama.cpp; it and llama.cpp's converters come from the package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.llama_cpp import converters
from tests.conftest import ROOT

pytestmark = [pytest.mark.full, pytest.mark.launch]


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """llama.cpp's converters, in the user's own cache."""
    missing = [name for name in ("gguf", "sentencepiece", "xllamacpp") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed: pip install 'fsdp-qlora[gguf,bench]'")
    try:
        return converters(None, print)
    except ModelError as error:
        pytest.skip(f"llama.cpp's converters are not here: {error}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    """Folder of the quickstart's run: the one that is here, or a new one (5 minutes on 2 cores)."""
    finished = ROOT / "outputs" / "quickstart"
    if (finished / "summary.json").is_file() and (finished / "adapter").is_dir():
        return finished
    root = tmp_path_factory.mktemp("outputs")
    command("train", "experiment=quickstart", f"run.output_root={root}", "run.name=who", timeout=2700)
    return root / "who"


@pytest.fixture(scope="module")
def ours(run: Path, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the trained model itself says, and the file of what it was asked."""
    rows = tmp_path_factory.mktemp("rows") / "rows.json"
    said = module("tests.gguf_reference", run, rows, real_data / "alpaca_en_demo.jsonl")
    assert "fsdp_qlora" in said["who"]
    return said, rows


def command(*arguments: str, timeout: float = 900) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fsdp_qlora", *arguments], env=env, text=True, capture_output=True, timeout=timeout,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(name: str, *arguments: Path | str) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", name, *map(str, arguments)], env=env, text=True, capture_output=True, timeout=1800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(label: str, theirs: dict[str, Any], ours: dict[str, Any], nat: float, equal: int) -> None:
    same = sum(a == b for a, b in zip(theirs["greedy"], ours["greedy"], strict=True))
    difference = theirs["logprob"] - ours["logprob"]
    print(f"{label}: {theirs['logprob']:.4f}, ours {ours['logprob']:.4f}; {same} of {len(ours['greedy'])} greedy")
    print(f"{label}: {theirs['who']!r}, ours {ours['who']!r}")
    assert abs(difference) < nat
    assert same >= equal
    assert "fsdp_qlora" in theirs["who"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "nat", "equal"), [("f16", 0.01, 18), ("q8_0", 0.03, 0)])
def test_a_merged_model_is_the_trained_one(llama_cpp, run, ours, tmp_path, kind, nat, equal):
    said, rows = ours
    target = tmp_path / "out"
    arguments = (
        "export", "what=gguf", f"run_from={run / 'config.yaml'}", f"adapter={run / 'adapter'}", f"export.to={target}",
        f"export.gguf_type={kind}", "export.merge_base=dequantized", f"export.llama_cpp={llama_cpp}",
    )  # fmt: skip
    printed = command(*arguments)
    assert "272 tensors" in printed and "ollama create NAME" in printed
    names = sorted(path.name for path in target.iterdir())
    assert names == ["Modelfile", "gguf.json", f"model-{kind}.gguf"]
    modelfile = (target / "Modelfile").read_text()
    assert f"FROM ./model-{kind}.gguf\n" in modelfile and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "trained by Hugging Face<|im_end|>" in modelfile and "left out" not in modelfile
    theirs = module("tests.llama_runtime", target / f"model-{kind}.gguf", "", rows)
    compare(kind, theirs, said, nat, equal)


@pytest.mark.timeout(3600)
def test_an_adapter_alone_is_the_trained_model_on_the_bases_file(llama_cpp, run, ours, tmp_path):
    """The base is in 16 bits here and was in 4 in training, so plain transformers with that base is the judge."""
    _, rows = ours
    target = tmp_path / "out"
    common = ("export", "what=gguf-adapter", f"adapter={run / 'adapter'}", f"export.llama_cpp={llama_cpp}")
    command(*common, f"export.to={target}")
    assert sorted(path.name for path in target.iterdir()) == ["Modelfile", "adapter.gguf", "base-f16.gguf", "gguf.json"]
    assert "FROM ./base-f16.gguf\nADAPTER ./adapter.gguf\n" in (target / "Modelfile").read_text()
    for file in ("adapter.gguf", "base-f16.gguf"):
        assert b".cache" not in (target / file).read_bytes()[:100_000], "no path of this machine"
    theirs = module("tests.llama_runtime", target / "base-f16.gguf", target / "adapter.gguf", rows)
    judge = module("tests.gguf_reference", run, rows)
    compare("adapter", theirs, judge, 0.01, 18)
    alone = tmp_path / "alone"
    command(*common, f"export.to={alone}", f"export.gguf_base={target / 'base-f16.gguf'}")
    assert sorted(path.name for path in alone.iterdir()) == ["Modelfile", "adapter.gguf", "gguf.json"]
    assert (alone / "adapter.gguf").read_bytes() == (target / "adapter.gguf").read_bytes()
    again = subprocess.run(
        [sys.executable, "-m", "fsdp_qlora", *common, f"export.to={alone}"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert again.returncode == 2 and "export.overwrite=true" in again.stderr
