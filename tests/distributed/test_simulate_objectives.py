"""A simulated step of an objective takes the memory of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig

from fsdp_qlora.objectives import build_objective
from tests.objectives import CASES
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


SIMULATED = [kind for kind, case in CASES.items() if case.family not in ("bart", "marian", "whisper")]


def test_models_of_which_no_step_was_compared_are_not_simulated() -> None:
    config: Any = BartConfig()
    assert build_objective("seq2seq").stand_in(Path(), config, 2, 8) is None


@pytest.mark.parametrize("kind", some_in_full(SIMULATED, ["bert, pairs and numbers"]))
def test_simulated_peak_is_the_real_one(pool: Pool, tmp_path: Path, kind: str) -> None:
    require_alike(pool, *many_tokens(kind, tmp_path))
