"""Says in plain words what a run did, from its curves: learned, still falling, overfits, or nothing learned.

Pure functions of numbers: curves go in, an `Outcome` comes out. Losses are means over tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, NamedTuple

Word = Literal["learned", "still falling", "overfits", "nothing learned"]
LEARNED: Word = "learned"
STILL_FALLING: Word = "still falling"
OVERFITS: Word = "overfits"
NOTHING_LEARNED: Word = "nothing learned"

Curve = Sequence[tuple[int, float]]
"""Steps, ascending, and the loss after each."""
_GAIN = 0.02
"""A loss has fallen if it lost at least this share of what it was."""
_RISE = 0.05
"""A held-out loss has risen if it gained at least this share of its lowest value, and of what it had fallen by."""
_FALL = 0.1
"""A loss still falls if the last third of the steps brought at least this share of the whole fall."""
_LAST = 1 / 3
_WINDOW = 0.1
"""Share of the training steps that a value of the smoothed training loss is the mean of."""
_LEAST_STEPS = 50
"""Fewer steps than this are few."""
_OFF = 10
"""A learning rate off the usual one by this factor is suspect."""
_FEW_TARGETS = 0.02
"""Share of supervised tokens below which hardly anything is learned from."""
_FEW_LINEARS = 0.5
"""Share of the decoder layers' linears below which adapters are on few."""


@dataclass(frozen=True)
class Facts:
    """What else is known of a run: the likely reasons, where nothing was learned."""

    steps: int
    lr: float
    usual_lr: float | None
    """What ``optim.lr=auto`` would take; None if no law is known."""
    tokens: int
    target_tokens: int
    """Supervised ones among them."""
    adapted: float = 1.0
    """Share of the decoder layers' linears that have an adapter."""


class Reason(NamedTuple):
    """A likely reason for a run that learned nothing."""

    kind: Literal["steps", "lr", "supervised", "linears", "rows"]
    text: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    word: Word
    held_out: bool
    """Whether the losses are those of held-out rows; otherwise they are training losses, smoothed."""
    before: float
    best: float
    best_step: int
    after: float
    last_step: int
    reasons: tuple[Reason, ...] = field(default=())
    """Likely reasons, the likeliest first, where nothing was learned."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for summary.json."""
        return {
            "word": self.word, "held_out": self.held_out, "before": self.before, "best": self.best,
            "best_step": self.best_step, "after": self.after, "last_step": self.last_step,
            "reasons": [reason.text for reason in self.reasons], "text": self.text(),
        }  # fmt: skip

    def text(self) -> str:
        """Return what happened, in one or two sentences."""
        kind = "held-out loss" if self.held_out else "training loss"
        curve = f"{kind} {self.before:.2f} -> {self.after:.2f}"
        lowest = f", lowest {self.best:.2f} after step {self.best_step}" if self.best_step != self.last_step else ""
        if self.word == LEARNED:
            blind = "" if self.held_out else " Nothing was held out, so it may have learned these rows and no more."
            return f"{curve}{lowest}.{blind}"
        if self.word == STILL_FALLING:
            return f"{curve}, and it was still falling when the run stopped: train longer."
        if self.word == OVERFITS:
            return (
                f"{curve}; it has been rising since step {self.best_step}, where it was {self.best:.2f}: from there on "
                "the run learned its rows by heart."
            )
        reasons = "; ".join(reason.text for reason in self.reasons)
        return f"{curve}. Likely reasons, the likeliest first: {reasons}."


def judge(evaluations: Curve, losses: Curve, facts: Facts) -> Outcome | None:
    """Return how a run ended, by its held-out loss, or by its training loss if it has not been evaluated twice.

    Returns None if there are fewer than two values of either.

    Args:
        evaluations: the held-out losses.
        losses: the training losses.
        facts: what else is known of the run.
    """
    held_out = len(evaluations) > 1
    curve = list(evaluations) if held_out else smoothed(losses)
    if len(curve) < 2:
        return None
    (_, before), (last_step, after) = curve[0], curve[-1]
    best_step, best = min(curve, key=lambda point: (_known(point[1]), point[0]))
    fell = before - best
    rose = after - best
    if not isfinite(after) or fell < _GAIN * before:
        word = NOTHING_LEARNED
    elif held_out and rose > _RISE * best and rose > _RISE * fell:
        word = OVERFITS
    elif falls(curve):
        word = STILL_FALLING
    else:
        word = LEARNED
    reasons = tuple(likely_reasons(curve, facts)) if word == NOTHING_LEARNED else ()
    return Outcome(word, held_out, before, best, best_step, after, last_step, reasons)


def falls(curve: Curve) -> bool:
    """Whether a loss was still falling at its end: by the line through the last third, of what it fell as a whole.

    The line is the least-squares fit to the points of the last third, and the one before them.
    """
    first, last = curve[0][0], curve[-1][0]
    begin = last - _LAST * (last - first)
    start = max((number for number, (step, _) in enumerate(curve) if step <= begin), default=0)
    part = curve[start:]
    fall = -slope(part) * _LAST * (last - first)
    return fall >= _FALL * (curve[0][1] - min(loss for _, loss in curve)) and fall >= _GAIN * curve[-1][1]


def slope(curve: Curve) -> float:
    """Return the slope of the least-squares line through the points, in nats a step."""
    mean_x = sum(x for x, _ in curve) / len(curve)
    mean_y = sum(y for _, y in curve) / len(curve)
    spread = sum((x - mean_x) ** 2 for x, _ in curve)
    return sum((x - mean_x) * (y - mean_y) for x, y in curve) / spread if spread else 0.0


def smoothed(losses: Curve) -> list[tuple[int, float]]:
    """Return the means of the training losses over consecutive windows of a tenth of the steps."""
    size = max(1, round(_WINDOW * len(losses)))
    windows = [losses[at : at + size] for at in range(0, len(losses) - size + 1, size)]
    return [(window[-1][0], sum(loss for _, loss in window) / len(window)) for window in windows]


def likely_reasons(curve: Curve, facts: Facts) -> list[Reason]:
    """Return why nothing was learned, in the order of their likelihood; each that the numbers speak for, or all."""
    rate = f"the learning rate, {facts.lr:.2g}"
    usual = "" if facts.usual_lr is None else f"; optim.lr=auto takes {facts.usual_lr:.2g} for this size of model"
    off = facts.usual_lr is not None and not facts.usual_lr / _OFF <= facts.lr <= facts.usual_lr * _OFF
    rose = not isfinite(curve[-1][1]) or curve[-1][1] > (1 + _RISE) * curve[0][1]
    high = rose or (facts.usual_lr is not None and facts.lr > facts.usual_lr)
    judged = f" ({'is' if off else 'may be'} too {'high' if high else 'low'}{usual})"
    few = facts.target_tokens < _FEW_TARGETS * max(1, facts.tokens)
    steps = Reason("steps", f"too few steps ({facts.steps})")
    likely = {
        steps: facts.steps < _LEAST_STEPS and not off and not rose,
        Reason("lr", rate + judged): off or rose,
        Reason(
            "supervised", f"hardly anything is supervised ({facts.target_tokens:,} of {facts.tokens:,} tokens)"
        ): few,
        Reason("linears", f"adapters on too few linears ({facts.adapted:.0%} of them)"): facts.adapted < _FEW_LINEARS,
    }
    said = [reason for reason, speaks in likely.items() if speaks]
    return said or [
        steps, Reason("lr", rate + usual.replace(";", ",", 1)),
        Reason("rows", "rows that hold nothing to learn: they contradict each other, or the model knows them"),
    ]  # fmt: skip


def _known(loss: float) -> float:
    return loss if isfinite(loss) else float("inf")
