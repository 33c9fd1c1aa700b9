"""Real checkpoints that packages carry: what a run's end says of held-out rows is what plain PEFT computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_package import plain_loss
from tools.real_models import GEMMA

pytestmark = [pytest.mark.launch, pytest.mark.full]


@pytest.fixture(params=["smollm2-135m-instruct", "gemma-3-270m"])
def checkpoint(request: pytest.FixtureRequest, real_model: Path) -> Path:
    """Folder of a real model; Gemma 3 is skipped where it was not fetched."""
    if request.param != "gemma-3-270m":
        return real_model
    if not (GEMMA / "config.json").is_file():
        pytest.skip("not here; `python -m tools.real_models` fetches it")
    return GEMMA


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_plain_peft_gives_the_trainers_loss(cli, cli_env, checkpoint, real_data, tmp_path, precision, limit):
    cache = {"FSDP_QLORA_CACHE": str(tmp_path / "cache")}
    result = cli(
        "train", f"model.name={checkpoint}", f"data.train={real_data / 'wiki_demo.txt'}", "data.max_rows=24",
        "data.eval_fraction=0.2", "data.max_length=128", "train.max_steps=3", "train.global_batch_size=4",
        "optim.lr=1e-3", f"precision={precision}", "run.name=real", "launcher.device=cpu",
        "launcher.nproc_per_node=2", timeout=600, **cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "outputs/real/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    found = plain_loss(tmp_path / "outputs/real", {**cli_env, **cache}, tmp_path, precision)
    print(f"{checkpoint.name} {precision}: trainer {summary['eval_loss_after']}, plain PEFT {found['loss']}")
    assert abs(found["loss"] - summary["eval_loss_after"]) < limit * summary["eval_loss_after"]
