"""The simulated accelerator: torch's private parts still behave, bytes are a CPU's, and host memory is counted apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_qlora.errors import PlanError
from fsdp_qlora.optim.bnb import PAGED
from fsdp_qlora.simulate.result import Simulation
from fsdp_qlora.simulate.step import simulate
from tests.simulated import TOKENS, VARIANTS, VOCABULARY, also_on_cpu, config_and_ranks

ROOT = Path(__file__).resolve().parents[2]
FAST = ("1 rank", "2 ranks", "params", "activations, full", "modules", "small, all")
"""The variants of `make test`; all others are simulated in the full tier."""
INPUTS = 4 * 8 * TOKENS
"""Bytes of ids, labels, positions and targets, int64: on the device, and on a CPU not made by the step."""
LOGITS = 256 * VOCABULARY * 4
"""Bytes of a chunk's logits in float32, which a GPU has at once and a CPU in parts."""
SMALL = 2048
"""Bytes of random states and other tensors of a few numbers."""
OTHERWISE = {
    "dropout": "a GPU keeps its masks as bytes, a CPU in the input's dtype",
    "1 rank, float32": "GPUs have no fused attention for float32 with grouped heads",
    "float32": "GPUs have no fused attention for float32 with grouped heads",
    "whole base, float32": "GPUs have no fused attention for float32 with grouped heads",
    "whole base, float32, alone": "GPUs have no fused attention for float32 with grouped heads",
    "packed, varlen": "a GPU has one kernel, a CPU computes in blocks",
}
"""Variants whose activations on a GPU are not those on a CPU, and why."""


def _run(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated", str(folder), *names],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]  # and no abort at exit
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Simulate every variant that a selected test asks for, in one process."""
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = {getattr(getattr(item, "callspec", None), "params", {}).get("name") for item in mine}
    return _run(tmp_path_factory.mktemp("simulated"), ["CHECKS", *(name for name in VARIANTS if name in wanted)])


def _names(*words: str, without: tuple[str, ...] = ()) -> list[Any]:
    chosen = [name for name in VARIANTS if any(word in name for word in words or ("",)) and name not in without]
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in chosen]


def _simulation(found: dict[str, dict[str, Any]], name: str, where: str = "device") -> Simulation:
    line = found[name]
    assert "error" not in line, (line["error"], line["traceback"])
    return Simulation.from_values(line[where])


def test_torchs_device_type_from_python_still_behaves(found: dict[str, dict[str, Any]]) -> None:
    """If this fails, torch changed what device.py stands on."""
    checks = found["CHECKS"]
    assert checks == {
        "name": "CHECKS",
        "real ones become fake": "simulated:0",
        "mixed": "FakeTensorDeviceMismatchError",
        "item": "DataDependentOutputException",
        "host": "cpu",
        "pinned": [False, True],
        "flash": "ScaledDotProductFlashAttentionBackward0",
        "mask": "ScaledDotProductEfficientAttentionBackward0",
        "float32": "ScaledDotProductEfficientAttentionBackward0",
        "grouped float32": "UnsafeViewBackward0",  # of single operations
        "accelerator": "simulated",
        "silu": ["aten.silu.default", "aten.silu_backward.default"],
    }


def test_this_process_has_no_simulated_device() -> None:
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"


@pytest.mark.parametrize("name", _names())
def test_the_peak_is_the_planned_one(found: dict[str, dict[str, Any]], name: str) -> None:
    simulated = _simulation(found, name)
    assert simulated.peak_bytes == pytest.approx(found[name]["peak"], rel=0.1)
    if simulated.host is None:  # a CPU's is the host's
        return
    if (planned := found[name]["host"]) > 0:
        # moved activations: no gradient flows to the embedding, so the first norm of these few layers saves nothing
        assert simulated.host_peak_bytes == pytest.approx(planned, rel=0.04 if found[name]["moved"] else 0.02)
    else:  # step counters, and zero codes of 8-bit states
        assert simulated.host_peak_bytes is not None and simulated.host_peak_bytes < 4096


@pytest.mark.parametrize("name", _names(without=tuple(name for name in VARIANTS if not also_on_cpu(name))))
def test_bytes_are_those_of_a_simulated_cpu(found: dict[str, dict[str, Any]], name: str) -> None:
    there, here = _simulation(found, name), _simulation(found, name, "cpu")
    assert here.host is None and there.places.keys() == here.places.keys()
    for place, peak in there.places.items():
        ours = here.places[place]
        adamw = VARIANTS[name].get("optim", {"name": "adamw"})["name"] == "adamw"
        roots = ours.gradients if "update" in place and adamw else 0  # fused AdamW has no temporaries
        counters = ours.optimizer - peak.optimizer - roots  # four bytes a tensor, on the host or on the device
        assert abs(counters) < SMALL
        assert peak.parameters == ours.parameters
        if name in OTHERWISE:
            continue
        more = LOGITS if place == "forward of the head" else 0
        assert -SMALL <= peak.total + roots - ours.total <= INPUTS + more + SMALL, (place, peak, ours)
        if peak.total - ours.total <= INPUTS + SMALL and "embedding" not in place:  # else at other moments
            assert (peak.gradients, peak.gather) == (ours.gradients, ours.gather), place


@pytest.mark.parametrize(
    "name", _names("params", without=tuple(n for n in VARIANTS if "optim" in n or "objective" in n))
)
def test_parameters_gradients_and_states_are_on_the_host_to_the_byte(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    simulated, planned = _simulation(found, name), found[name]["bytes"]
    assert planned["base_packed"] == planned["adapters"] == planned["optimizer"] == 0  # none is on the device
    buffers = 4096
    assert all(peak.parameters < buffers and peak.optimizer == 0 for peak in simulated.places.values())
    assert simulated.host is not None
    update = simulated.host["update of the adapters"]
    counters = update.total - found[name]["host"]
    assert 0 < counters < SMALL  # four bytes for each tensor that is trained
    assert update.optimizer - counters == 3 * update.gradients  # AdamW's two moments, and the root of one


@pytest.mark.parametrize(
    "name", _names("1 rank", "a copy per rank", without=tuple(n for n in VARIANTS if "host" in n or not also_on_cpu(n)))
)
def test_what_one_rank_keeps_is_planned_to_the_byte(found: dict[str, dict[str, Any]], name: str) -> None:
    """Packed weights and, beside them, dense ones that stay from step to step."""
    simulated, planned = _simulation(found, name), found[name]["bytes"]
    kept = [planned[kind] for kind in ("base_packed", "base_statistics", "base_kept", "base_dense", "adapters")]
    dense = "not cached" not in name and "int8" not in name  # which multiplies without a dense copy
    assert (planned["base_dense"] > 0) == dense
    assert all(0 <= peak.parameters - sum(kept) < SMALL for peak in simulated.places.values())  # offsets, rotary tables


@pytest.mark.parametrize("name", _names("whole base"))
def test_a_whole_base_takes_16_bytes_a_parameter(found: dict[str, dict[str, Any]], name: str) -> None:
    update = _simulation(found, name).places["update of the adapters"]
    planned = 16 * found[name]["tensors"] // VARIANTS[name].get("ranks", 2)
    assert found[name]["moments"]["update"] == planned
    assert 0 <= update.total - planned < 4096  # buffers, step counters, random states


@pytest.mark.parametrize(("offload", "others"), [pytest.param("params", "2 ranks", marks=pytest.mark.full)])
def test_offload_saves_what_was_on_the_device(
    found: dict[str, dict[str, Any]], offload: str, others: str, tmp_path: Path
) -> None:
    lines = _run(tmp_path, [offload, others])
    with_, without = (_simulation(lines, name) for name in (offload, others))
    assert with_.place == without.place == "forward of the head"
    saved = without.peak_bytes - with_.peak_bytes
    kept = without.peak.parameters + without.peak.optimizer - with_.peak.parameters
    assert saved == kept
    planned = lines[others]["bytes"]
    fixed = sum(planned[kind] for kind in ("base_packed", "base_statistics", "base_kept", "adapters", "optimizer"))
    assert saved == pytest.approx(fixed, abs=SMALL)


def test_what_cannot_be_simulated_is_refused_by_name(tmp_path: Path) -> None:
    for name, words in (("params", "fsdp.offload=params"), ("modules", "fsdp.offload_modules")):
        with pytest.raises(PlanError, match=rf"plan\.simulate: on a CPU.*{words} changes nothing.*set plan\.gpu"):
            simulate(*config_and_ranks(tmp_path, name, None))
    for name in PAGED:
        VARIANTS[name] = {"optim": {"name": name}}
        try:
            with pytest.raises(PlanError, match=rf"plan\.simulate: optim={name} .* simulate optim=adamw"):
                simulate(*config_and_ranks(tmp_path, name))
        finally:
            del VARIANTS[name]


@pytest.mark.full
def test_a_library_call_simulates_in_a_process_of_its_own(tmp_path: Path) -> None:
    simulated = simulate(*config_and_ranks(tmp_path, "params"))
    assert simulated.host_peak_bytes and simulated.peak_bytes
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    config, _ = config_and_ranks(tmp_path, "params")
    (tmp_path / "llama/config.json").write_text('{"model_type": "none"}')
    with pytest.raises(Exception, match="none") as error:  # of the same kind and with the same message as here
        simulate(config, 2)
    assert type(error.value).__name__ == "ModelError"


@pytest.mark.full
def test_ctrl_c_ends_both_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.simulated import config_and_ranks\n"
        "from fsdp_qlora.simulate.step import simulate\n"
        "config = config_and_ranks(Path(sys.argv[1]), 'params'); print('ready', flush=True); simulate(*config)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 30
    while not (children := _children(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) == 1
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=60) in (1, 130, -signal.SIGINT)
    while _runs(children[0]) and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    assert not _runs(children[0])


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for init to take note."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
