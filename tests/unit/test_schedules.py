"""Schedules are pure functions of the step."""

from __future__ import annotations

import itertools

import pytest

from fsdp_qlora.config.schema import ScheduleSettings
from fsdp_qlora.optim.schedules import build_schedule


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd"])
def test_warms_up_peaks_and_ends(name):
    factor = build_schedule(ScheduleSettings(name=name, warmup_steps=4, min_lr_ratio=0.1), 40)
    values = [factor(step) for step in range(40)]
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[4] == pytest.approx(1.0)
    assert all(0 < v <= 1 for v in values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[4:]))
    assert factor(40) == pytest.approx(1.0 if name == "constant" else 0.1)
    if name == "wsd":
        assert values[31] == 1.0 > values[33]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_after_the_warm_up_it_is_transformers(name):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    ours = build_schedule(ScheduleSettings(name=name, warmup_steps=3), 20)
    for step in range(20):
        if step >= 3:
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
