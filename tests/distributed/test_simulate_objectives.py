"""A simulated step of an objective takes the memory of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.errors import PlanError
from fsdp_qlora.simulate.step import simulate
from tests.build import config_of
from tests.objectives import CASES
from tests.other_families import write_each
from tests.pool import Pool
from tests.real_steps import require_alike
from tests.tiers import some_in_full

MANY_TOKENS: dict[str, Any] = {
    "data": {"max_length": 128}, "train": {"global_batch_size": 8, "micro_batch_size": 2}, "precision": {"name": "bf16"},
}  # fmt: skip


def many_tokens(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write a case; return its model and settings of a step in which activations weigh something."""
    model, groups = CASES[kind].write(folder)
    for name, settings in MANY_TOKENS.items():
        groups[name] = {**groups.get(name, {}), **settings}
    return Path(model), groups


OTHERS = ["mbart", "pegasus", "blenderbot", "mvp", "plbart", "longt5", "umt5", "m2m_100"]
"""More encoder-decoders of transformers."""


@pytest.mark.full
@pytest.mark.parametrize("model_type", OTHERS)
def test_other_encoder_decoders_take_what_is_simulated(pool: Pool, tmp_path: Path, model_type: str) -> None:
    require_alike(pool, *_small(tmp_path, model_type))


def test_code_that_reads_values_is_refused_by_name(tmp_path: Path) -> None:
    """LED's attention asks whether any token is global."""
    folder, groups = _small(tmp_path, "led")
    with pytest.raises(PlanError, match="the model's own code reads values of its tensors"):
        simulate(config_of(str(folder), **groups), 2)


def _small(folder: Path, model_type: str) -> tuple[Path, dict[str, Any]]:
    """Write a small model of a type and rows; return its folder and settings."""
    assert write_each(folder, "seq2seq", [model_type]) == {}
    return folder / model_type, {
        **MANY_TOKENS, "objective": {"name": "seq2seq", "generate_rows": 0, "max_target_length": 32},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.0, "max_length": 64},
        "quant": {"allow_16bit": True},
    }  # fmt: skip


@pytest.mark.parametrize("kind", some_in_full(CASES, ["bert, pairs and numbers"]))
def test_simulated_peak_is_the_real_one(pool: Pool, tmp_path: Path, kind: str) -> None:
    require_alike(pool, *many_tokens(kind, tmp_path))
