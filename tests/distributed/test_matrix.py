"""Each of transformers' causal language models is trained as its own code says, or refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.matrix import MODEL_TYPES, VARIANTS, outcome, sample

ALWAYS = ["llama", "deepseek_v3", "gpt2", "gemma3_text", "gpt_oss", "hyperclovax", "bloom", "olmoe"]
"""Families of kinds that went wrong once: a saved buffer, another layout, a cap, sinks, a scale, ALiBi, in place."""
OF_EACH_KIND = ["llama", "gpt2", "qwen3_moe", "deepseek_v3", "mamba2", "bart", "gemma3", "bloom", "bert", "jamba"]
TABLE = Path(__file__).parents[2] / "docs" / "families.md"
HEADER = """# Model families

Written by `tests/distributed/test_matrix.py` (`make test-full`): for each causal language model of transformers a small
model of its own class, with random weights, trained here (float32, NF4, adapters on all linears) beside stock
transformers + bitsandbytes + PEFT on the same rows. *equal*: losses within 1e-5 and gradients within 1e-4, relative, padded
and packed; the exported adapter gives the same loss in plain PEFT; eight greedy tokens after a prompt padded on the left
are those of upstream's `generate`; in bf16 all dtypes are upstream's and the losses are at most twice as far from float32
as upstream's own; a plan for a GPU takes an attention that the class takes. *refused*: one message before the first step, exit code 2. *not small*: no small model of this class could be
made (its default config does not build, or needs another package), so nothing was compared.

"""


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("model_type", sorted({*ALWAYS, *sample(4, "fast")}))
def test_a_family_is_equal_or_refused(pool, model_type, packed):
    found = pool.run(1, outcome, model_type, {}, packed, not packed)[0]
    assert found["kind"] in ("equal", "refused", "not small"), found
    assert not found.get("also"), found
    assert packed or model_type not in ALWAYS or found["kind"] == "equal", found


@pytest.mark.full
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_equal(pool, name, packed):
    model_type, more = VARIANTS[name]
    found = pool.run(1, outcome, model_type, more, packed)[0]
    assert found["kind"] == "equal", found


@pytest.mark.full
@pytest.mark.parametrize("model_type", OF_EACH_KIND)
def test_two_ranks_give_the_same(pool, model_type):
    for packed in (False, True):
        found = pool.run(2, outcome, model_type, {}, packed)
        assert found[0]["kind"] == found[1]["kind"], found
        assert found[0]["kind"] in ("equal", "refused"), found[0]
        assert packed or found[0]["kind"] == "equal", found[0]


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_every_family(pool):
    padded = {name: pool.run(1, outcome, name, {}, False, True)[0] for name in MODEL_TYPES}
    packed = {name: pool.run(1, outcome, name, {}, True)[0] for name in MODEL_TYPES if padded[name]["kind"] == "equal"}
    TABLE.write_text(HEADER + table(padded, packed))
    everything = [*padded.items(), *packed.items()]
    wrong = {name: found for name, found in everything if found["kind"] in ("WRONG", "TRACEBACK")}
    assert not wrong, wrong
    assert not {name: found["also"] for name, found in padded.items() if found.get("also")}
    assert sum(found["kind"] == "equal" for found in padded.values()) >= 120
    assert sum(found["kind"] == "not small" for found in padded.values()) <= 12


def table(padded: dict[str, dict[str, Any]], packed: dict[str, dict[str, Any]]) -> str:
    """Return the lines of docs/families.md."""
    counts = [f"{sum(f['kind'] == kind for f in padded.values())} {kind}" for kind in ("equal", "refused", "not small")]
    both = sum(found["kind"] == "equal" for found in packed.values())
    lines = [
        f"{len(padded)} model types: {', '.join(counts)}; {both} equal packed, too.",
        "",
        "| model type | padded | packed | attention on a CPU | remark |",
        "|---|---|---|---|---|",
    ]
    for name, found in padded.items():
        second = packed.get(name, {})
        remark = (found["why"] or second.get("why", "")).replace("|", "\\|").replace("\n", " ")[:260]
        lines.append(
            f"| {name} | {found['kind']} | {second.get('kind', '')} | {found.get('attention', '')} | {remark} |"
        )
    return "\n".join(lines) + "\n"
