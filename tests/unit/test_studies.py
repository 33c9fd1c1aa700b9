"""The studies' page says what its numbers say: means by token, and paired intervals over rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies.__main__ import PAGE, ROOT
from benchmarks.studies.claims import CLAIMS, promises, word
from benchmarks.studies.compare import difference, mean
from benchmarks.studies.page import write_page
from benchmarks.studies.questions import STUDIES, units
from fsdp_qlora.cli.compose import compose_config


def _unit(shift: float, rows: int = 40) -> dict:
    losses = [(float(3 + n % 5) * 10 + shift * 10, 10) for n in range(rows)]
    sets = {"held_out": losses, "unrelated": losses, "elsewhere": losses}
    return {
        "before": sets, "after": sets, "trainable_parameters": 10, "adapter_bytes": 10, "checkpoint_bytes": 10,
        "quantized_bytes": 10, "planned_bytes_per_rank": 10, "cpu_seconds": 1.0, "device": "test", "date": "2026-01-01",
        "commit": "abc",
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
    write_page(tmp_path, {"quant=none run.seed=0": _unit(0.0), "run.seed=0": _unit(0.1)})
    page = (tmp_path / "README.md").read_text()
    assert "nf4 (1 of 3 seeds)" in page and "+0.1000 (+0.1000 to +0.1000)" in page and "Not run yet." in page


@pytest.mark.full
def test_all_units_are_settings_that_exist():
    assert all(study.reference in study.variants for study in STUDIES)
    some = units([study.name for study in STUDIES])
    for overrides in {unit.overrides for unit in some}:
        compose_config("train", ["model.name=any", "data.train=rows.jsonl", *overrides])


def test_a_promise_holds_only_if_its_whole_interval_does():
    lower, near = (next(claim for claim in CLAIMS if claim.near is kind) for kind in (False, True))
    for gap, of_lower, of_near in (
        ((-0.2, -0.3, -0.1), "holds", "holds"), ((0.01, -0.01, 0.03), "not shown", "holds"),
        ((0.03, 0.01, 0.05), "does not hold", "not shown"), ((0.2, 0.1, 0.3), "does not hold", "does not hold"),
    ):  # fmt: skip
        assert [word(lower, gap, 2.0), word(near, gap, 2.0)] == [of_lower, of_near]
    for claim in CLAIMS:
        (study,) = [study for study in STUDIES if study.name == claim.study]
        assert {claim.variant, claim.reference} <= study.variants.keys()


def test_readme_says_what_the_studies_measured():
    results, readme = json.loads((PAGE / "results.json").read_text()), (ROOT / "README.md").read_text()
    lines = list(promises(results))
    assert len(lines) > 5 and all(f"\n{line}\n" in readme for line in lines)
