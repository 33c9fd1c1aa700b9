"""Learning rates as pure functions of the position in a run: no state to save, no dependence on ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

from fsdp_qlora.config.schema import ScheduleSettings

Schedule = Callable[[float], float]
"""Position in the run, in steps from 0 -> factor on the peak learning rate."""


def build_schedule(settings: ScheduleSettings, num_steps: int) -> Schedule:
    """Return the schedule over ``num_steps``: linear warm-up, then the named decay to ``min_lr_ratio``.

    Like transformers' ``get_scheduler``, except that no step has a learning rate of 0, which would waste it. ``wsd`` is
    warm-up-stable-decay with a linear decay (MiniCPM, https://arxiv.org/abs/2404.06395, section 4).
    """
    warmup = _warmup_steps(settings, num_steps)
    floor = settings.min_lr_ratio
    decay_steps = max(1, num_steps - warmup)
    stable = num_steps - max(1, round(settings.decay_ratio * num_steps))

    def decay(step: float) -> float:
        """Return the position between floor (0) and peak (1) after the warm-up."""
        if settings.name == "constant":
            return 1.0
        if settings.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / decay_steps)))
        if settings.name == "linear":
            return max(0.0, (num_steps - step) / decay_steps)
        return 1.0 if step < stable else max(0.0, (num_steps - step) / (num_steps - stable))

    def factor(step: float) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return floor + (1 - floor) * decay(step)

    return factor


def warmup_notice(settings: ScheduleSettings, num_steps: int) -> str:
    """Return a notice if the run ends during the warm-up, else an empty string."""
    warmup = settings.warmup_steps
    if warmup < num_steps:
        return ""
    return (
        f"schedule.warmup_steps: the warm-up takes {warmup} steps, but the run has {num_steps}, so the learning rate "
        f"never reaches optim.lr and ends at {num_steps / (warmup + 1):.0%} of it."
    )


def _warmup_steps(settings: ScheduleSettings, num_steps: int) -> int:
    return settings.warmup_steps or math.ceil(settings.warmup_ratio * num_steps)
