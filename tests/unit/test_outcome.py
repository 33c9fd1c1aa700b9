"""What the end of a run says, on curves."""

from __future__ import annotations

from math import exp, nan

import pytest

from fsdp_qlora.train.outcome import (
    LEARNED,
    NOTHING_LEARNED,
    OVERFITS,
    STILL_FALLING,
    Facts,
    falls,
    judge,
    slope,
    smoothed,
)

STEPS = range(0, 181, 30)
FACTS = Facts(steps=180, lr=1.3e-3, usual_lr=1.3e-3, tokens=10_000, target_tokens=3_000)
CURVES = {
    "settles": ([0.5 + 2.5 * exp(-step / 25) for step in STEPS], LEARNED),
    "settles with noise": ([3.0, 1.2, 0.62, 0.55, 0.56, 0.54, 0.55], LEARNED),
    "falls in a line": ([3.0 - step / 100 for step in STEPS], STILL_FALLING),
    "falls late": ([3.0, 2.9, 2.7, 2.2, 1.6, 1.0, 0.6], STILL_FALLING),
    "rises after the second": ([3.0, 1.4, 1.1, 1.3, 1.6, 1.8, 1.9], OVERFITS),
    "rises at once": ([2.4, 2.2, 2.5, 2.9, 3.0, 3.1, 3.2], OVERFITS),
    "does not move": ([3.0, 2.999, 2.998, 2.999, 2.998, 2.997, 2.997], NOTHING_LEARNED),
    "explodes": ([3.0, 9.1, 8.0, 7.7, 7.6, 7.5, 7.5], NOTHING_LEARNED),
    "is not a number": ([3.0, 1.0, nan, nan, nan, nan, nan], NOTHING_LEARNED),
}


def test_a_curve_has_its_word():
    for name, (values, word) in CURVES.items():
        ending = judge(list(zip(STEPS, values, strict=True)), [], FACTS)
        assert ending is not None and ending.word == word, name
        assert ending.held_out and ending.before == values[0] and (ending.reasons == ()) == (word != NOTHING_LEARNED)
        assert word != OVERFITS or f"since step {STEPS[values.index(min(values))]}" in ending.text()


@pytest.mark.full
def test_reasons_come_in_their_order():
    still = [(0, 3.0), (20, 2.99)]

    def first(**facts: float) -> str:
        ending = judge(still, [], Facts(**{**vars(FACTS), **facts}))
        assert ending is not None and ending.word == NOTHING_LEARNED
        return ending.reasons[0].text

    assert "too few steps (20)" in first(steps=20)
    assert "1e-07 (is too low; optim.lr=auto takes 0.0013 for this size of model)" in first(lr=1e-7)
    assert "the learning rate, 1 (is too high" in first(lr=1.0)
    assert "hardly anything is supervised (10 of 10,000 tokens)" in first(target_tokens=10)
    assert "adapters on too few linears (14% of them)" in first(adapted=0.14)
    ending = judge(still, [], FACTS)
    assert ending is not None and len(ending.reasons) == 3 and "contradict" in ending.reasons[-1].text


@pytest.mark.full
def test_without_held_out_rows_the_training_loss_speaks():
    losses = [(step, 0.2 + 2 * exp(-step / 20) + 0.05 * (step % 3)) for step in range(1, 201)]
    ending = judge([], losses, FACTS)
    assert ending is not None and ending.word == LEARNED and not ending.held_out
    assert "Nothing was held out" in ending.text()
    assert judge([(0, 3.0)], [(1, 3.0)], FACTS) is None
    assert smoothed([(1, 1.0), (2, 3.0)]) == [(1, 1.0), (2, 3.0)]


@pytest.mark.full
def test_the_slope_is_the_least_squares_line():
    assert slope([(0, 3.0), (1, 2.0), (2, 1.0)]) == pytest.approx(-1.0)
    assert slope([(0, 0.0), (1, 3.0), (2, 0.0), (3, 3.0)]) == pytest.approx(0.6)  # by hand: 3/5
    assert falls([(0, 3.0), (90, 2.0), (180, 1.0)]) and not falls([(0, 3.0), (90, 1.0), (180, 1.0)])
