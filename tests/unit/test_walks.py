"""Walks on the fake CUDA device (`tests.fake_cuda`): devices are not mixed, and a step waits for its device once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.guard import NoCompilerError, build_guard
from tests.fake_cuda.variants import FAST, VARIANTS

ROOT = Path(__file__).resolve().parents[2]
Walk = Mapping[str, Any]
MASK = "transformers/masking_utils.py"
"""transformers asks, once a micro-batch, whether rows are packed."""
MORE = {
    "experts": "quant/experts.py",  # how many tokens each expert gets: once a layer and micro-batch
    "offload": "_fsdp_param_group.py",  # FSDP waits until gradients are in host memory
    "optim paged": "optim/bnb.py",  # before the host may touch paged memory
}
"""Variants whose names begin so wait elsewhere, too (docs/numerics.md says why)."""


def _walk(folder: Path, names: list[str]) -> dict[str, Walk]:
    try:
        build_guard(folder)
    except NoCompilerError as error:
        pytest.skip(str(error))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda", str(folder), *names],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Walk]:
    """Walk every variant that a selected test asks for, in one process."""
    wanted = {item.callspec.params["name"] for item in request.session.items if _asks(item)}
    return _walk(tmp_path_factory.mktemp("walks"), [name for name in VARIANTS if name in wanted])


def _asks(item: Any) -> bool:
    return item.path == Path(__file__) and "name" in getattr(getattr(item, "callspec", None), "params", {})


def _names(planted: bool) -> list[Any]:
    chosen = [name for name in VARIANTS if name.startswith("planted") == planted]
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in chosen]


@pytest.mark.parametrize("name", _names(planted=False))
def test_a_run_mixes_no_devices_and_a_step_waits_once(walked, name):
    walk = walked[name]
    assert "error" not in walk, (walk["error"], walk["traceback"][-1500:])
    assert walk["unwaited"] == []
    assert walk["races"] == []
    steps = walk["syncs"]["step 3"]
    allowed = [place for start, place in MORE.items() if all(word in name for word in start.split())]
    waits = {where: n for where, n in steps.items() if not any(place in where for place in (MASK, *allowed))}
    assert sum(waits.values()) == 1 and "all_sum" in next(iter(waits)), steps
    assert sum(n for where, n in steps.items() if MASK in where) <= VARIANTS[name].accumulation
    copies = [where for where in walk["copies"]["step 3"] if "pageable, blocking" in where]
    assert not copies or "offload" in name, copies
    assert not walk["copies"].get("save")  # what is on the host is saved from there
    assert walk["launches"]["export"] and walk["launches"]["evaluate"]  # it went to the end


@pytest.mark.full
def test_planted_faults_are_found(tmp_path):
    names = [name for name in VARIANTS if name.startswith("planted")]
    found = _walk(tmp_path, names)
    buffer, item, early, stream = (found[f"planted: {name}"] for name in (
        "a_buffer_on_the_host", "an_item_in_the_step", "a_copy_read_too_early", "a_stream_that_nobody_waits_for",
    ))  # fmt: skip
    assert "device" in buffer["error"] and "cpu" in buffer["error"]
    assert any("faults" in where or "forward" in where for where in item["syncs"]["step 3"])
    assert sum(item["syncs"]["step 3"].values()) == 2 + 1 + 2  # masks, the loop, and the planted ones
    assert early["unwaited"]
    races = [race.split(" @ ")[0] for race in stream["races"]]
    assert races[0] == "aten::mul_" and set(races) - {"aten::mul_"}  # what waits for nothing, and what reads it


def test_one_rank_gathers_nothing_and_two_gather_bytes(walked):
    assert "step 3" not in walked["1 rank"]["gathered"]
    assert walked["2 ranks"]["gathered"]["step 3"] > 0


@pytest.mark.parametrize("name", ["1 rank", pytest.param("a copy per rank", marks=pytest.mark.full)])
def test_dense_weights_that_no_one_reshards_stay_from_step_to_step(walked, name):
    def dequantized(phase, name=name):
        return sum(n for op, n in walked[name]["launches"][phase].items() if "dequantize_4bit" in op)

    linears = 2 * 7  # of two layers
    assert [dequantized(phase) for phase in ("load", "step 1", "step 2", "step 3", "evaluate")] == [linears, 0, 0, 0, 0]
    assert dequantized("step 3", "2 ranks") == 2 * linears  # once for each micro-batch


def test_one_rank_copies_layers_from_the_host_while_others_compute(walked):
    """Of two layers, the second of forward and the first of backward arrive while the other one computes."""
    arrived = walked["offload params, 1 rank"]["arrived"]["step 3"]
    layer = arrived["beside"] / 2 / 2  # two passes, two micro-batches
    edges = 2 * 2 * 1024 * 256 * 2  # in both micro-batches: the embedding and the head, bfloat16
    inputs = 2 * 8 * 3 * 48  # ids, labels and supervised places, int64
    assert arrived["alone"] == pytest.approx(2 * 2 * layer + edges, abs=2 * inputs)
    assert layer > 500_000
    assert "beside" not in walked["1 rank"]["arrived"]["step 3"]


def test_adamw_is_one_kernel_on_the_device_and_runs_on_the_host_with_the_states(walked):
    ours = "aten._foreach_norm", "aten._foreach_mul_"  # the gradients' norm, and clipping
    steps = {name: walked[name]["launches"]["step 3"] for name in ("1 rank", "offload params")}
    of_each = {name: {op for op in ops if "_foreach_" in op or "adamw" in op} for name, ops in steps.items()}
    assert of_each["1 rank"] == {*ours, "aten._fused_adamw_", "aten._foreach_add_"}  # which counts the steps
    assert not of_each["offload params"] & {"aten._fused_adamw_", "aten._foreach_addcdiv_"}


def test_without_a_compiler_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompilerError, match=r"no g\+\+"):
        build_guard(tmp_path / "none")
