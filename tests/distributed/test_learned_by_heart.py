"""Sixteen rows are learned by heart on a sharded quantized base: those of encoders and of classifiers on decoders.

Those of encoder-decoders, speech and images stand beside what else is tested of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from tests.build import run_fit
from tests.objectives import CASES

pytestmark = pytest.mark.full
ROWS = 16
HEARD: dict[str, tuple[str, float, int]] = {
    "BERT, sequences": ("bert, pairs and numbers", 0.01, 60),
    "BERT, words": ("bert, words", 0.01, 100),
    "BERT, masked": ("bert, masked", 0.002, 900),
    "BERT, pairs": ("bert, pairs", 0.01, 60),
    "Llama, sequences": ("llama, names", 0.01, 60),
    "Llama, words": ("llama, words", 0.01, 60),
    "Llama, pairs": ("llama, pairs", 0.01, 60),
}
"""Name -> key in `CASES`, learning rate and steps."""


def _settings(groups: dict[str, Any], lr: float, steps: int) -> dict[str, Any]:
    """Return settings of a run on sixteen rows, which are held out, too."""
    rows = Path(groups["data"]["train"])
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:ROWS]))
    return groups | {
        "data": groups["data"] | {"eval": str(rows), "eval_fraction": 0.0},
        "quant": {"name": "nf4", "double_quant": True},
        "lora": {"r": 16, "alpha": 32},
        "optim": {"lr": lr},
        "train": {"max_steps": steps, "global_batch_size": 16, "micro_batch_size": 8, "eval_batch_size": 8},
    }


def _spread_tokens(folder: Path) -> None:
    """Let a tiny model's tokens differ enough that it can say them without a trained head."""
    model: Any = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", HEARD)
def test_sixteen_rows_are_learned_by_heart(pool, tmp_path, name):
    pytest.importorskip("sklearn", reason="the extra tasks")
    kind, lr, steps = HEARD[name]
    model, groups = CASES[kind].write(tmp_path)
    if "masked" in name:
        _spread_tokens(Path(model))
    summary = pool.run(2, run_fit, model, str(tmp_path), "run", _settings(groups, lr, steps))[0]["summary"]
    assert summary["eval_loss_after"] < 0.1 * summary["eval_loss_before"]
    # of pairs, a text that is another row's answer, too, is found first there
    assert summary["metrics_after"].get("accuracy", 1.0) > 0.9
