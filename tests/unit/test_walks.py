"""Walks on the fake CUDA device (`tests.fake_cuda`): devices are not mixed, and a step waits for its device once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.guard import NoCompilerError, build_guard
from tests.fake_cuda.pairs import ALL_PAIRS, FACTORS, all_pairs, refused
from tests.fake_cuda.variant import Variant, config_of
from tests.fake_cuda.variants import FAST, VARIANTS

pytestmark = pytest.mark.timeout(3000)  # one process walks all, and other work may share its core
ROOT = Path(__file__).resolve().parents[2]
Walk = Mapping[str, Any]
MASK = "transformers/masking_utils.py"
"""transformers asks, once a micro-batch, whether rows are packed."""
MORE = {
    "_fsdp_param_group.py": lambda _, config: config.fsdp.offloads_parameters,  # gradients arrive in host memory
    "checks/gradients.py": lambda variant, _: len(variant.steps) == 2,  # the second step of a start
    "optim/bnb.py": lambda _, config: config.optim.name.startswith("paged"),  # the host may touch paged memory
}
"""Where else a step waits, and whether a variant does (docs/numerics.md says why)."""


GENERATION = (
    "transformers/generation/", "transformers/cache_utils.py", "transformers/pytorch_utils.py",  # once a token, or more
    "transformers/utils/generic.py", "fsdp_qlora/inference/generate.py",  # the answer, and the prompt
    "fsdp_qlora/model/root.py",  # inputs that transformers sent to the first parameter, in host memory
)  # fmt: skip
"""Where an answer waits: around the layers, not in them."""


SAVED = ("copies", "syncs", "gathered")
"""What a save does not do before the stager: it takes each rank's shards from where they are."""


def _walk(folder: Path, names: list[str]) -> dict[str, Walk]:
    try:
        build_guard(folder)
    except NoCompilerError as error:
        pytest.skip(str(error))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda", str(folder), *names],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=2900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Walk]:
    """Walk every variant that a selected test asks for, and those of `make test`, in one process."""
    wanted = {item.callspec.params["name"] for item in request.session.items if _asks(item)} | set(FAST)
    chosen = [name for name in (*VARIANTS, ALL_PAIRS) if name in wanted or name.split(": ")[0] in wanted]
    return _walk(tmp_path_factory.mktemp("walks"), chosen)


def _asks(item: Any) -> bool:
    return item.path == Path(__file__) and "name" in getattr(getattr(item, "callspec", None), "params", {})


def _names(planted: bool) -> list[Any]:
    chosen = [name for name in VARIANTS if name.startswith("planted") == planted]
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in chosen]


def _faults(variant: Variant, walk: Walk) -> list[str]:
    """Return what is wrong with a walk."""
    if "skipped" in walk:
        pytest.skip(f"{walk['skipped']}; FSDP_QLORA_TEST_LIGER may name a folder that holds them (CONTRIBUTING.md)")
    if "error" in walk:
        return [walk["error"], walk["traceback"][-1500:]]
    config, last = config_of(Path("model"), variant), f"step {variant.steps[-1]}"
    steps, generate = walk["syncs"][last], walk["syncs"]["generate"]
    allowed = [place for place, waits in MORE.items() if waits(variant, config)]
    waits = {where: n for where, n in steps.items() if not any(place in where for place in (MASK, *allowed))}
    copies = [where for where in walk["copies"][last] if "pageable, blocking" in where]
    in_layers = [where for where in generate if not where.split(" <- ")[0].split(" @ ")[1].startswith(GENERATION)]
    in_layers = [where for where in in_layers if not any(place in where for place in allowed)]
    evaluate = {
        where: n for where, n in walk["syncs"]["evaluate"].items() if not any(p in where for p in (MASK, *allowed))
    }
    done = {phase: bool(walk["launches"].get(phase)) for phase in ("evaluate", "generate", "export")}
    checks = {
        f"read too early: {walk['unwaited']}": not walk["unwaited"],
        f"races: {walk['races']}": not walk["races"],
        f"{last} waits at {waits}": sum(waits.values()) == 1 and "all_sum" in next(iter(waits)),
        f"evaluation waits at {evaluate}": sum(evaluate.values()) == 1 and "all_sum" in next(iter(evaluate)),
        f"masks: {steps}": sum(n for where, n in steps.items() if MASK in where) <= variant.accumulation,
        f"copied from pageable memory: {copies}": not copies or config.fsdp.offload != "none",
        f"generation waits in its layers: {in_layers}": not in_layers,
        "what is saved is copied, waited for or gathered": not any(walk[kind].get("save") for kind in SAVED),
        f"went to the end: {done}": all(done.values()),
        f"safetensors asked for the bytes: {walk['ended']}": "Error while serializing" in walk["ended"],
        f"export waits: {walk['syncs']['export']}": all(
            "export/adapter.py" in where for where in walk["syncs"]["export"]
        ),
    }
    return [what for what, holds in checks.items() if not holds]


@pytest.mark.parametrize("name", _names(planted=False))
def test_a_run_mixes_no_devices_and_a_step_waits_once(walked, name):
    assert _faults(VARIANTS[name], walked[name]) == []


@pytest.mark.parametrize("name", [ALL_PAIRS])
def test_so_do_all_pairs_of_settings(walked, name):
    faults = {each: _faults(variant, walked[each]) for each, variant in all_pairs().items()}
    assert {each: wrong for each, wrong in faults.items() if wrong} == {}


def test_the_walks_hold_every_pair_of_values_that_the_product_takes():
    rows = [set(zip(FACTORS, name.split(", "), strict=True)) for name in all_pairs()]
    values = [(factor, value) for factor, parts in FACTORS.items() for value in parts]
    missing = [pair for pair in combinations(values, 2) if not any(row.issuperset(pair) for row in rows)]
    across = [(a, b) for a, b in missing if a[0] != b[0]]
    assert across and all(refused(FACTORS[a[0]][a[1]], FACTORS[b[0]][b[1]]) for a, b in across)
    assert (("offload", "offload params"), ("adapters", "replicated")) in across
    assert len(rows) <= 48  # 8 optimizers x 5 formats need 40


STAGES = ["planted", pytest.param("planted in generate", marks=pytest.mark.full)]


@pytest.mark.parametrize("name", STAGES)
def test_planted_faults_are_found(walked, name):
    """In a step, and in generation; whoever does not end in an error goes on to the adapter's file."""
    names = [each for each in VARIANTS if each.startswith(f"{name}: ")]
    buffer, item, early, stream = (walked[each] for each in names)
    assert "device" in buffer["error"] and "cpu" in buffer["error"]
    (said,) = _faults(VARIANTS[names[1]], item)[:1]
    if name == "planted":
        assert "step 3 waits at" in said and "item @ transformers/models/llama" in said
        assert sum(item["syncs"]["step 3"].values()) == 2 + 1 + 2  # masks, the loop, and the planted ones
    else:
        assert "generation waits in its layers" in said and "item @ transformers/models/llama" in said
    assert [what.split(":")[0] for what in _faults(VARIANTS[names[2]], early)] == ["read too early"]
    assert [what.split(":")[0] for what in _faults(VARIANTS[names[3]], stream)] == ["races"]
    races = [race.split(" @ ")[0] for race in stream["races"]]
    assert races[0] == "aten::mul_" and set(races) - {"aten::mul_"}  # what waits for nothing, and what reads it
    assert all("Error while serializing" in walk["ended"] for walk in (item, early, stream))


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


@pytest.mark.full
@pytest.mark.parametrize("name", ["modules on the host, 1 rank"])
def test_one_rank_copies_a_head_from_the_host_while_layers_compute(walked, name):
    arrived = walked[name]["arrived"]["step 3"]
    edge, norm = 1024 * 256 * 4, 256 * 4  # float32
    inputs = 2 * 8 * 3 * 48
    # In both micro-batches the head, the second layer's norms and the final one in forward, the first layer's in backward
    assert arrived["beside"] == 2 * (edge + 5 * norm)
    # The embedding, the norms of the layer that begins a pass, and the final one in backward
    assert arrived["alone"] == pytest.approx(2 * (edge + 5 * norm), abs=inputs)


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
