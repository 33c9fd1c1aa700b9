"""Objectives beside sft: losses are upstream's own, on any number of ranks; runs resume; exports load in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.build import essence, losses, metrics, run_fit
from tests.objectives import CASES, exported_outputs, upstream_losses
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES

FAST = {"bert, pairs and numbers"}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", some_in_full(CASES, FAST))
def test_losses_are_upstreams(pool, tmp_path, kind, num_ranks):
    model, groups = CASES[kind].write(tmp_path)
    ours = losses(pool.run(num_ranks, run_fit, model, str(tmp_path), "run", groups)[0]["metrics"])
    wanted = pool.run(1, upstream_losses, model, groups, kind)[0]
    assert len(ours) == 6 and ours == pytest.approx(wanted, rel=FP32_LOSSES)


@pytest.mark.parametrize("kind", some_in_full(CASES, FAST))
def test_a_run_resumes_and_its_adapter_loads_in_plain_peft(pool, tmp_path, kind):
    model, groups = CASES[kind].write(tmp_path)
    groups["checkpoint"] = {"every_steps": 3}
    whole = pool.run(2, run_fit, model, str(tmp_path), "whole", groups)[0]
    pool.run(2, run_fit, model, str(tmp_path), "split", {**groups, "train": {"max_steps": 3}})
    pool.run(2, run_fit, model, str(tmp_path), "split", groups)
    assert essence(metrics(tmp_path / "split"))[-1] == essence(metrics(tmp_path / "whole"))[-1]
    summary = whole["summary"]
    assert summary["metrics_after"].keys() == summary["metrics_before"].keys() != set()
    adapter = tmp_path / "whole/adapter"
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert config["modules_to_save"]
    named = AutoConfig.from_pretrained(adapter)
    assert named.num_labels == len(named.id2label) and named.architectures[0].endswith("Classification")
    assert torch.isfinite(torch.tensor(summary["eval_loss_after"]))
    loss, saved = pool.run(1, exported_outputs, model, groups, str(adapter))[0]
    assert torch.isfinite(loss).all() and saved
