"""The numbers of a run where they are ``auto``, against the formulas worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.errors import DataError
from fsdp_qlora.plan.recipe import Recipe, RowCounts, Shape, choose_recipe, usual_rate

SMALL, LARGE, QWEN = Shape(576, "llama"), Shape(4096, "llama"), Shape(4096, "qwen3")


def _recipe(rows: RowCounts | None, shape: Shape = SMALL, **groups: Any) -> Recipe:
    return choose_recipe(from_dict(groups), shape, rows)


def test_numbers_follow_the_formulas():
    # rows to learn from and held out -> rows per step, epochs, steps between evaluations
    expected = {
        (91, 5): (8, 15, 29),  # 12 steps an epoch; 200 * 8 / 91 = 17.6 epochs, capped: 171 steps
        (16, 4): (1, 12, 32),  # 16 steps an epoch; 12.5 epochs, to even: 192 steps
        (950, 50): (16, 3, 30),  # 3.37 epochs: 179 steps
        (9_800, 200): (16, 1, 103),  # 613 steps: one epoch at least
        (91, 0): (8, 15, 0),
        (5, 0): (1, 15, 0),
    }
    for (train, held_out), (size, epochs, every) in expected.items():
        made = _recipe(RowCounts(train, held_out))
        assert (made.rows_per_step, made.num_epochs, made.eval_every) == (size, epochs, every), train
        assert set(made.choices) == {"train.global_batch_size", "train.num_epochs", "optim.lr", "train.eval_every"}
    # 5e-4 * (2000 / hidden) ** p
    rates = {SMALL: 1.3e-3, LARGE: 2.9e-4, QWEN: 4.7e-4, Shape(4096, "gemma3"): 2.9e-4, Shape(576, "gemma3"): 5.5e-4}
    for shape, lr in rates.items():
        assert _recipe(None, shape).lr == lr


@pytest.mark.full
def test_numbers_typed_by_hand_win():
    made = _recipe(
        RowCounts(91, 5), train={"num_epochs": 2.5, "global_batch_size": 4, "eval_every": 7}, optim={"lr": 1e-4}
    )  # fmt: skip
    assert (made.rows_per_step, made.num_epochs, made.lr, made.eval_every) == (4, 2.5, 1e-4, 7) and not made.choices
    by_steps = _recipe(RowCounts(91, 5), train={"max_steps": 600})
    assert "train.num_epochs" not in by_steps.choices and by_steps.eval_every == 100
    assert by_steps.num_steps(from_dict({"train": {"max_steps": 600}}), 91) == 600
    assert _recipe(RowCounts(91, 5), train={"max_steps": 8}).eval_every == 0  # too short
    assert _recipe(RowCounts(91, 5), train={"micro_batch_size": 32}).rows_per_step == 32  # one micro-batch at least
    settled = made.settled(RunConfig())
    assert (settled.train.global_batch_size, settled.optim.peak_lr, settled.train.num_epochs) == (4, 1e-4, 2.5)


@pytest.mark.full
def test_the_learning_rate_follows_the_scaling():
    whole = {"alpha": 32, "r": 16}
    for lora, lr in (
        ({**whole, "r": 256}, 1.3e-3),  # the rank is in PEFT's scaling already
        ({**whole, "alpha": 16}, 2.6e-3),  # half the scaling
        ({**whole, "variant": "rslora"}, 3.3e-4),  # alpha / 4 instead of alpha / 16: four times the scaling
        ({"variant": "none"}, 1.3e-4),
        ({"variant": "ia3"}, 2e-4),
    ):
        assert _recipe(None, lora=lora).lr == lr, lora
    assert _recipe(None, optim={"name": "sgd"}).lr == 1e-2
    config = from_dict({"optim": {"lr": 1e-7}})
    assert usual_rate(config.lora, config.optim, SMALL) == pytest.approx(1.3e-3, rel=0.05)
    assert usual_rate(config.lora, from_dict({"optim": {"name": "sgd"}}).optim, SMALL) is None


@pytest.mark.full
def test_evaluations_without_rows_are_refused():
    for groups, key in (
        ({"train": {"eval_every": 5}}, "train.eval_every"), ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best"),
        ({"train": {"early_stopping_patience": 2}}, "train.early_stopping_patience"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=key):
            _recipe(RowCounts(10, 0), **groups)
