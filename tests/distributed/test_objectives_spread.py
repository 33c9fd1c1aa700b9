"""Each objective with what is kept in host memory, and with every optimizer: as for chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.config import choices
from tests.build import essence, losses, metrics, run_fit
from tests.objectives import CASES
from tests.pool import Pool
from tests.tolerances import FP32_LOSSES

KINDS = ["llama, names", "bert, words", "bert, masked", "bert, pairs", "t5", "whisper", "vit"]
"""One of each objective, or two where a model of another form has it."""
ON_HOST: dict[str, dict[str, Any]] = {
    "parameters": {"offload": "params"},
    "activations": {"offload": "activations"},
    "both": {"offload": "all"},
    "norms": {"offload_modules": ["norms"]},
}


def _short(kind: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Write a case; return its model and the settings of a run of four steps without an evaluation."""
    model, groups = CASES[kind].write(folder)
    groups["data"] = {**groups["data"], "eval_fraction": 0.0}
    groups["train"] = {**groups["train"], "max_steps": 4}
    return model, groups


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_on_the_host_changes_no_loss(pool: Pool, tmp_path: Path, kind: str) -> None:
    model, groups = _short(kind, tmp_path)
    plain = losses(pool.run(2, run_fit, model, str(tmp_path), "plain", groups)[0]["metrics"])
    assert len(plain) == 4
    for name, settings in ON_HOST.items():
        other = pool.run(2, run_fit, model, str(tmp_path), name, {**groups, "fsdp": settings})[0]
        # norms on the host are summed apart in the gradient's norm
        assert losses(other["metrics"]) == (pytest.approx(plain, rel=FP32_LOSSES) if name == "norms" else plain), name


@pytest.mark.full
@pytest.mark.parametrize("name", choices.OPTIMIZERS.shipped)
@pytest.mark.parametrize("kind", ["bert, words", "t5", "vit"])
def test_every_optimizer_resumes(pool: Pool, tmp_path: Path, kind: str, name: str) -> None:
    """A head that is trained whole, with its bias, stands among the adapters of the first and the last."""
    model, groups = _short(kind, tmp_path)
    groups |= {"optim": {"name": name}, "checkpoint": {"every_steps": 2}}
    whole = pool.run(2, run_fit, model, str(tmp_path), "whole", groups)[0]["metrics"]
    before = losses(whole)
    assert len(before) == 4 and len(set(before)) == 4
    groups["checkpoint"] = {"resume": str(tmp_path / "whole/checkpoints/step_00000002")}
    pool.run(2, run_fit, model, str(tmp_path), "resumed", groups)
    assert essence(metrics(tmp_path / "resumed"))[-2:] == essence(whole)[-2:]
