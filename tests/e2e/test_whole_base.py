"""`quant=none lora=none` on the command line: trained, answered from, evaluated, and no adapter to export."""

from __future__ import annotations

import json
import shlex

import pytest

pytestmark = pytest.mark.launch


def test_a_trained_base_is_a_model_and_has_no_adapter(cli, tiny_model, chat_rows, tmp_path):
    settings = (
        "quant=none", "lora=none", f"model.name={tiny_model}", f"data.train={chat_rows}", "data.eval_fraction=0.2",
        "data.max_length=64", "train.max_steps=3", "train.global_batch_size=4", "train.micro_batch_size=2",
        "checkpoint.every_steps=3", "launcher.device=cpu", "launcher.nproc_per_node=2", "run.name=whole",
    )  # fmt: skip
    trained = cli("train", *settings)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "outputs" / "whole"
    assert (run / "model" / "config.json").is_file() and not (run / "adapter").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable_parameters"] == summary["base_parameters"]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]

    (line,) = [line for line in trained.stdout.splitlines() if line.startswith("try next: ")]
    answered = cli(*shlex.split(line.removeprefix("try next: "))[1:], "generate.max_new_tokens=4")
    assert answered.returncode == 0, answered.stderr
    result = (f"run_from={run / 'config.yaml'}", f"model.name={run / 'model'}", "evaluate.json=out.json")
    evaluated = cli("evaluate", *result)
    assert evaluated.returncode == 0, evaluated.stderr
    loss = json.loads((tmp_path / "out.json").read_text())["eval_loss"]
    assert loss == pytest.approx(summary["eval_loss_after"], rel=1e-3)

    for what in ("adapter", "merged"):
        refused = cli("export", f"what={what}", f"run_from={run / 'config.yaml'}", "export.to=given")
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert "lora=none" in refused.stderr and str(run / "model") in refused.stderr, refused.stderr
        assert not (tmp_path / "given").exists()
