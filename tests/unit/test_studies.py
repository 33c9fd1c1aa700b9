"""The studies' page says what its numbers say: means by token, and paired intervals over rows."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.page import difference, mean, write_page
from benchmarks.studies.questions import STUDIES, units
from fsdp_qlora.cli.compose import compose_config


def _unit(shift: float, rows: int = 40) -> dict:
    losses = [(float(3 + n % 5) * 10 + shift * 10, 10) for n in range(rows)]
    sets = {"held_out": losses, "unrelated": losses, "elsewhere": losses}
    return {
        "before": sets, "after": sets, "trainable_parameters": 10, "adapter_bytes": 10, "device": "test",
        "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip


def test_a_loss_is_a_mean_over_tokens():
    assert mean([(6.0, 2), (1.0, 8)]) == pytest.approx(0.7)


def test_rows_are_paired():
    draw = np.random.default_rng(0)
    one = [(float(value), 1) for value in draw.normal(5, 2, 60)]
    other = [(value + 0.1, 1) for value, _ in one]
    gap, low, high = difference([other], [one])
    assert [gap, low, high] == pytest.approx([0.1] * 3)  # the rows differ by far more than the two variants
    noise = [(float(value), 1) for value in draw.normal(5, 2, 60)]
    gap, low, high = difference([noise], [one])
    assert low < 0 < high


def test_a_page_names_what_was_not_run(tmp_path):
    write_page(tmp_path, {"formats/none/0": _unit(0.0), "formats/nf4/0": _unit(0.1)})
    page = (tmp_path / "README.md").read_text()
    assert "nf4 (1 of 3 seeds)" in page and "+0.1000 (+0.1000 to +0.1000)" in page and "Not run yet." in page


def test_all_units_are_settings_that_exist():
    names = [unit.name for unit in units()]
    assert len(names) == len(set(names)) and all(study.reference in study.variants for study in STUDIES)
    for overrides in {unit.overrides for unit in units()}:
        compose_config("train", ["model.name=any", "data.train=rows.jsonl", *overrides])
