"""objective=sft on models that read images: losses and gradients are upstream's, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.build import losses, run_fit
from tests.image_chats import VISION, upstream_losses, write_conversations, write_image_chat_model
from tests.tolerances import FP32_LOSSES

pytestmark = pytest.mark.full


def _case(folder: Path, family: str, **groups: Any) -> tuple[str, dict[str, Any]]:
    """Write a model and conversations; return its folder and the settings of a run."""
    model = write_image_chat_model(folder / "base", family)
    settings: dict[str, Any] = {
        "data": {"train": str(write_conversations(folder / "data")), "max_length": 256},
        "precision": {"name": "fp32"},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "train": {"max_steps": 6},
    }
    for name, values in groups.items():
        settings[name] = {**settings.get(name, {}), **values}
    return str(model), settings


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", VISION)
def test_losses_are_upstreams_row_by_row(pool, tmp_path, family, num_ranks):
    model, groups = _case(tmp_path, family)
    ours = losses(pool.run(num_ranks, run_fit, model, str(tmp_path), "run", groups)[0]["metrics"])
    wanted, _ = pool.run(1, upstream_losses, model, groups, family)[0]
    assert len(ours) == 6 and ours == pytest.approx(wanted, rel=FP32_LOSSES)
