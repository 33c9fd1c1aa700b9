"""What is wrong with a base model, seen by one rank alone, ends all ranks alike and at once."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.nodes import once_per_node
from fsdp_qlora.errors import FsdpQloraError, ModelError
from tests.build import build
from tests.tiers import some_in_full
from tests.tiny import poison


def _change_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 350}))


def _as_directory(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _refused(ranks: Ranks, folders: list[str], quant: dict) -> tuple[str, int, bool, float]:
    started = time.monotonic()
    try:
        build(ranks, folders[ranks.rank], quant=quant)
    except FsdpQloraError as error:
        return str(error), error.exit_code, error.alike, time.monotonic() - started
    raise AssertionError("nothing was refused")


Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
SEEN_BY_THE_LAST = {
    "NaN in a quantized weight": (lambda f: poison(f, DOWN, (127, 351)), {}, [DOWN, "values that are not finite"]),
    "infinity without double quantization": (
        lambda f: poison(f, GATE, (351, 0), float("-inf")), {"double_quant": False},
        [GATE, "values that are not finite"]),
    "NaN in an unquantized weight": (
        lambda f: poison(f, Q, (127, 3)), {"name": "none"}, [Q, "values that are not finite"]),
    "NaN in a norm": (lambda f: poison(f, "model.norm.weight", (127,)), {}, ["model.norm.weight", "not finite"]),
    "a shape": (_change_shape, {}, ["model.layers.0.mlp", "the model needs [350, 128]"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), {}, ["no *.safetensors file"]),
    "no config": (lambda f: (f / "config.json").unlink(), {}, ["no config.json"]),
    "no folder": (shutil.rmtree, {}, ["there is no folder"]),
    "an unreadable file": (_as_directory, {}, ["model.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("case", some_in_full(SEEN_BY_THE_LAST, list(SEEN_BY_THE_LAST)[:4]))
def test_seen_by_the_last_rank_alone(pool, tiny_model, tmp_path, case):
    damage, quant, words = SEEN_BY_THE_LAST[case]
    bad = Path(shutil.copytree(tiny_model, tmp_path / "bad"))
    damage(bad)
    results = pool.run(3, _refused, [str(tiny_model), str(tiny_model), str(bad)], quant, timeout=30)
    assert len({result[:3] for result in results}) == 1
    message, code, alike, _ = results[0]
    assert code == 2 and alike and message.startswith("rank 2: "), results[0]
    for word in words:
        assert word in message
    assert max(seconds for *_, seconds in results) < 10


NODES = {
    "one node of four": ([0, 1, 2, 3], {0: 4}),
    "two nodes of two": ([0, 1, 0, 1], {0: 2, 2: 2}),
    "a rank for each node": ([0, 0, 0, 0], {0: 1, 1: 1, 2: 1, 3: 1}),
}


@pytest.mark.parametrize("case", NODES)
def test_one_process_of_each_node_works_and_all_wait_for_all(pool, case):
    local_ranks, expected = NODES[case]
    results = pool.run(4, _work_once, local_ranks, -1, timeout=30)
    assert Counter(leader for leader, *_ in results) == expected
    assert sum(done for _, done, _ in results) == len(expected)
    assert min(seconds for *_, seconds in results) >= 0.4 * len(expected)


def test_where_one_node_fails_all_raise_the_same_at_once(pool):
    results = pool.run(4, _work_once, [0, 1, 0, 1], 2, timeout=30)
    assert {result[0] for result in results} == {"rank 2: no room here"}
    assert max(seconds for *_, seconds in results[1:]) < 5


def _work_once(ranks: Ranks, local_ranks: list[int], failing: int) -> tuple[int | str, int, float]:
    started, done = time.monotonic(), 0

    def work() -> int:
        nonlocal done
        done = 1
        time.sleep(0.4 * sum(local == 0 for local in local_ranks[: ranks.rank + 1]))
        if ranks.rank == failing:
            raise ModelError("no room here")
        return ranks.rank

    try:
        found = once_per_node(work, ranks, local_ranks[ranks.rank], lambda _: None)
    except FsdpQloraError as error:
        assert error.exit_code == 2 and error.alike
        found = str(error)
    return found, done, time.monotonic() - started


def test_a_hub_name_without_network(pool, tmp_path):
    results = pool.run(2, _refused_offline, str(tmp_path), timeout=30)
    assert len({result[:3] for result in results}) == 1
    message, code, alike, seconds = results[0]
    assert code == 2 and alike and seconds < 10
    assert message.startswith("model.name: owner/tiny is not a local folder, and the hub did not provide it")


def _refused_offline(ranks: Ranks, folder: str) -> tuple[str, int, bool, float]:
    from unittest import mock

    with mock.patch("huggingface_hub.constants.HF_HUB_CACHE", folder):  # no network in a test; the cache is empty
        return _refused(ranks, ["owner/tiny"] * ranks.size, {})


def test_a_tensor_of_many_pieces_fills_as_in_one(pool, tiny_model, monkeypatch):
    assert all(pool.run(2, _same_in_pieces, str(tiny_model)))


def _same_in_pieces(ranks: Ranks, folder: str) -> bool:
    from unittest import mock

    whole = {n: t.clone() for n, t in _local_tensors(ranks, folder).items()}
    with (
        mock.patch("fsdp_qlora.load.stream.CHUNK_WEIGHTS", 1),
        mock.patch("fsdp_qlora.quant.formats.blocks4._CPU_WEIGHTS", 16384),
    ):
        pieces = _local_tensors(ranks, folder)
    return whole.keys() == pieces.keys() and all(torch.equal(whole[n], pieces[n]) for n in whole)


def _local_tensors(ranks: Ranks, folder: str) -> dict[str, torch.Tensor]:
    from fsdp_qlora.distributed.shards import local_tensor
    from fsdp_qlora.quant.packing import raw_bytes

    model = build(ranks, folder).model
    return {name: raw_bytes(local_tensor(p)) for name, p in model.named_parameters() if not p.requires_grad}
