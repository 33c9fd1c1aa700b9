"""``fsdp.shard_degree=auto``: the group that holds the base with room and takes the shortest estimated step."""

from __future__ import annotations

import json
from typing import Literal

import pytest

from fsdp_qlora.config.convert import convert
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.plan.layout import ROOM
from fsdp_qlora.run.decide import SHARD_DEGREE, planned
from tests.tiers import some_in_full

SMALL, LARGE = "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-2-70b-hf"
CLUSTERS = {
    "1 x 24 GB": ("rtx4090", 1, 1),
    "2 x 24 GB, PCIe": ("rtx3090", 2, 2),
    "4 x 16 GB, PCIe": ("rtx4060ti", 4, 4),
    "8 x 80 GB, NVLink": ("h100", 8, 8),
    "2 nodes of 8 x 80 GB": ("h100", 16, 8),
}
CHOSEN = {
    (SMALL, "1 x 24 GB"): 1, (SMALL, "2 x 24 GB, PCIe"): 1, (SMALL, "4 x 16 GB, PCIe"): 1,
    (SMALL, "8 x 80 GB, NVLink"): 1, (SMALL, "2 nodes of 8 x 80 GB"): 1,
    (LARGE, "1 x 24 GB"): 1, (LARGE, "2 x 24 GB, PCIe"): 2, (LARGE, "4 x 16 GB, PCIe"): 4,
    (LARGE, "8 x 80 GB, NVLink"): 8, (LARGE, "2 nodes of 8 x 80 GB"): 8,
}  # fmt: skip
"""By hand: 8B in nf4 is 4.5 GB + 2 GB of embedding and head, 70B 36 GB + 1 GB; the rest is activations of 2,048 tokens.
70B fits one H100 only with layers recomputed, which costs more than gathers over NVLink, and those between nodes more."""
TOO_LARGE = {(LARGE, "1 x 24 GB"), (LARGE, "2 x 24 GB, PCIe")}
"""Without quantized embeddings or offloading."""


def _planned(model: str, device: str | None, world_size: int, node_size: int, degree: object = "auto"):
    config = from_dict(
        {
            "model": {"name": model},
            "fsdp": {"shard_degree": degree},
            "plan": {"device": device},
            "launcher": {"nproc_per_node": node_size},
            "data": {"max_length": 2048},
            "train": {"global_batch_size": 64},
        }
    )
    return planned(config, world_size)


FAST = [(SMALL, "2 x 24 GB, PCIe"), (LARGE, "8 x 80 GB, NVLink")]


@pytest.mark.parametrize("model, where", some_in_full(list(CHOSEN), FAST))
def test_the_group_is_the_one_that_arithmetic_gives(model, where):
    device, world_size, node_size = CLUSTERS[where]
    config, _, plan = _planned(model, device, world_size, node_size)
    chosen = CHOSEN[model, where]
    assert (config.fsdp.shard_degree, config.fsdp.replicate_degree) == (chosen, world_size // chosen)
    assert plan.shard_size == chosen
    assert ("nothing fits" in plan.choices[SHARD_DEGREE].why) == ((model, where) in TOO_LARGE)


def test_a_group_that_fits_without_room_is_passed_over():
    _, _, tight = _planned(SMALL, "rtx4060ti", 4, 4)
    assert tight.peak <= ROOM * 15.7e9  # of 16 GiB less the reserve
    config, _, plan = _planned(LARGE, "h100", 8, 8)
    assert config.fsdp.shard_degree == 8 and "with one rank " in plan.choices[SHARD_DEGREE].why


def test_the_default_shards_over_all_ranks_and_auto_goes_with_no_replicas():
    config, _, plan = _planned(SMALL, "h100", 8, 8, 0)
    assert (config.fsdp.shard_degree, plan.shard_size) == (0, 8) and SHARD_DEGREE not in plan.choices
    both = from_dict({"fsdp": {"shard_degree": "auto", "replicate_degree": 2}})
    assert any("fsdp.replicate_degree" in line and "auto" in line for line in failures(both))


def test_a_degree_is_a_number_or_the_word():
    kind = type(from_dict({}).fsdp).__annotations__  # a string: annotations are not evaluated
    assert "auto" in kind["shard_degree"]
    for value, wanted in ((4, 4), ("4", 4), ("auto", "auto")):
        assert from_dict({"fsdp": {"shard_degree": value}}).fsdp.shard_degree == wanted
    for wrong in ("atuo", 1.5, True):
        with pytest.raises(ValueError, match="auto"):
            convert(wrong, int | Literal["auto"])


def test_the_command_line_prints_the_choice_and_its_reason(capsys):
    from fsdp_qlora.__main__ import main

    words = ["plan", f"model.name={SMALL}", "fsdp.shard_degree=auto", "plan.device=h100", "plan.world_size=2"]
    assert main([*words, "plan.json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["auto"][SHARD_DEGREE].startswith("1 (each rank keeps a whole copy")
