"""Resolves the ``auto`` of a run's numbers: rows per step, epochs, learning rate, evaluations.

Unlike the choices of `fsdp_qlora.plan.choices`, these change what comes out. So they depend only on the settings, the
model's config and the number of rows, never on the device or the number of ranks. A resume compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from fsdp_qlora.adapters.method import scaling_of
from fsdp_qlora.config.auto import Choice, number
from fsdp_qlora.config.facts import value_of
from fsdp_qlora.config.schema import LoraSettings, OptimSettings, RunConfig, TrainSettings
from fsdp_qlora.data.deal import num_steps
from fsdp_qlora.errors import DataError

ROWS, LEAST_STEPS = 16, 12
"""RowCounts per step, and the steps that an epoch should have at least."""
STEPS, MOST_EPOCHS = 200, 15
"""Steps that epochs should add up to, and the most epochs: small sets of rows are learned by heart beyond."""
EVALUATIONS, EVALUATED_STEPS = 5, 20
"""Evaluations between the first and the last, and the fewest steps of a run that has them."""
_LR, _HIDDEN, _SCALING = 5e-4, 2000, 32
"""The law of learning rates for LoRA: ``5e-4 * (2000 / hidden size) ** p`` at alpha 32, whatever the rank. Fitted to
sweeps over 14 models in "LoRA Without Regret" (Thinking Machines, 2025)."""
_LLAMA, _QWEN = 0.781, 0.0775
"""The law's exponent ``p`` for the two families that it was fitted to."""
_POWERS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _QWEN, "qwen2_moe": _QWEN, "qwen3": _QWEN, "qwen3_moe": _QWEN}
_WHOLE = 0.1
"""Training the whole base takes a tenth of LoRA's learning rate (the same source)."""
_ADAMW = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
_LORA = ("lora", "rslora", "dora")
_PLAIN = 2e-4
"""The learning rate of AdamW for other methods than LoRA's, of which no law is known."""
RATES: Mapping[str, float] = {"sgd": 1e-2, "lion_8bit": 3e-5, "ademamix_8bit": 2e-4, "adafactor": 5e-2}
"""The learning rates of the other optimizers, as in conf/optim."""


@dataclass(frozen=True)
class Shape:
    """What the learning rate depends on."""

    hidden_size: int
    model_type: str


@dataclass(frozen=True)
class RowCounts:
    """How many sequences there are to learn from and to evaluate on; packed ones if they are packed."""

    train: int
    held_out: int


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run."""

    rows_per_step: int
    num_epochs: float
    lr: float
    eval_every: int
    choices: dict[str, Choice] = field(default_factory=dict)
    """Those that were left at ``auto``, by key, and why."""

    def settled(self, config: RunConfig) -> RunConfig:
        """Return the settings with these numbers in place of ``auto``."""
        train = replace(
            config.train, global_batch_size=self.rows_per_step, num_epochs=self.num_epochs, eval_every=self.eval_every
        )
        return replace(config, train=train, optim=replace(config.optim, lr=self.lr))

    def num_steps(self, config: RunConfig, rows: int) -> int:
        """Return the number of optimizer steps on so many rows."""
        return num_steps(config.train.max_steps, self.num_epochs, rows, self.rows_per_step)


def choose_recipe(config: RunConfig, shape: Shape, rows: RowCounts | None) -> Recipe:
    """Return the numbers as asked for, and those chosen where they are ``auto``.

    Args:
        config: the settings.
        shape: the model.
        rows: how many there are; None if nothing has counted them (before data is there, or a stream).

    Raises:
        DataError: if evaluations are asked for, and there is nothing to evaluate on.
    """
    size, epochs, lr = batch_for(config.train, rows), epochs_for(config.train, rows), lr_for(config, shape)
    made = {"train.global_batch_size": size, "train.num_epochs": epochs, "optim.lr": lr}
    recipe = Recipe(int(size.value), float(epochs.value), float(lr.value), 0)
    every = _evaluations(config, recipe, rows)
    made["train.eval_every"] = every
    choices = {key: choice for key, choice in made.items() if number(value_of(config, key)) is None}
    if config.train.max_steps:  # decides alone
        choices.pop("train.num_epochs", None)
    return replace(recipe, eval_every=int(every.value), choices=choices)


def batch_for(train: TrainSettings, rows: RowCounts | None) -> Choice:
    """Return the rows per step: 16, or the most that give an epoch 12 steps; at least one micro-batch."""
    if (given := number(train.global_batch_size)) is not None:
        return Choice(str(given), "as asked")
    least = train.micro_batch_size
    if rows is None:
        return Choice(str(max(least, ROWS)), "if an epoch has 12 steps or more")
    size = max(n for n in range(1, ROWS + 1) if n == 1 or ceil(rows.train / n) >= LEAST_STEPS)
    if size < least:
        return Choice(str(least), "train.micro_batch_size")
    return Choice(str(size), f"an epoch of {rows.train} rows has {ceil(rows.train / size)} steps")


def epochs_for(train: TrainSettings, rows: RowCounts | None) -> Choice:
    """Return the epochs: whole ones that make about 200 steps, from 1 to 15."""
    if (given := number(train.num_epochs)) is not None:
        return Choice(f"{given:g}", "as asked")
    if rows is None:
        return Choice("1", "depends on the number of rows")
    size = int(batch_for(train, rows).value)
    wanted = STEPS * size / max(1, rows.train)
    epochs = min(MOST_EPOCHS, max(1, round(wanted)))
    steps = num_steps(0, epochs, rows.train, size)
    more = ", the most that auto takes" if wanted > MOST_EPOCHS else ""
    return Choice(str(epochs), f"{steps} steps{more}")


def lr_for(config: RunConfig, shape: Shape) -> Choice:
    """Return the peak learning rate, to two digits."""
    optim, lora = config.optim, config.lora
    if (given := number(optim.lr)) is not None:
        return Choice(repr(given), "as asked")
    if optim.name not in _ADAMW:
        return _rate(RATES[optim.name], f"the default of {optim.name}")
    if lora.trains_base:
        return _rate(_WHOLE * _law(shape), f"a tenth of LoRA's, for all weights of a {shape.model_type}")
    if lora.method not in _LORA:
        return _rate(_PLAIN, f"no law is known for {lora.method}")
    scale = usual_scale(lora)
    more = "" if scale == 1 else f", over {1 / scale:.3g} for the scaling of {lora.variant} at alpha {lora.alpha:g}"
    return _rate(_law(shape) * scale, f"hidden size {shape.hidden_size} of a {shape.model_type}{more}")


def usual_rate(lora: LoraSettings, optim: OptimSettings, shape: Shape) -> float | None:
    """Return the learning rate that the law gives, whatever was asked for; None if it says nothing of this kind."""
    if optim.name not in _ADAMW or (lora.method not in _LORA and not lora.trains_base):
        return None
    return _law(shape) * (_WHOLE if lora.trains_base else usual_scale(lora))


def usual_scale(lora: LoraSettings) -> float:
    """Return what the law is multiplied by: AdamW's steps have one size, so the scaling sizes the update of a weight.

    The law is for PEFT's ``alpha / r`` with alpha 32; a scaling twice as large takes half the learning rate.
    """
    return (_SCALING / lora.r) / scaling_of(lora)


def _law(shape: Shape) -> float:
    rates = [_LR * (_HIDDEN / shape.hidden_size) ** power for power in (_LLAMA, _QWEN)]
    if (power := _POWERS.get(shape.model_type)) is not None:
        return _LR * (_HIDDEN / shape.hidden_size) ** power
    return min(rates)


def _rate(value: float, why: str) -> Choice:
    return Choice(repr(float(f"{value:.1e}")), why)


def _evaluations(config: RunConfig, recipe: Recipe, rows: RowCounts | None) -> Choice:
    given = number(config.train.eval_every)
    if rows is None:
        return Choice(str(given or 0), "depends on the number of rows" if given is None else "as asked")
    nothing = not rows.held_out
    steps = recipe.num_steps(config, rows.train)
    times = 0
    if rows.held_out and steps >= EVALUATED_STEPS:  # evaluating takes at most as many rows as training
        times = min(EVALUATIONS, steps * recipe.rows_per_step // rows.held_out)
    every = (ceil(steps / (times + 1)) if times else 0) if given is None else given
    _require_rows(config, every, nothing)
    if given is not None:
        return Choice(str(given), "as asked")
    if nothing:
        return Choice("0", "nothing is held out")
    return Choice(str(every), f"{times} times between start and end" if every else "the run is too short for more")


def _require_rows(config: RunConfig, every: int, nothing: bool) -> None:
    """Refuse what needs evaluations where there are none.

    Raises:
        DataError: naming the setting.
    """
    wanted = {
        "train.eval_every": nothing and every > 0,
        "train.early_stopping_patience": config.train.early_stopping_patience > 0 and not every,
        "checkpoint.keep_best": config.checkpoint.keep_best > 0 and nothing,
    }
    for key, refused in wanted.items():
        if refused:
            raise DataError(
                f"{key}: needs evaluations, but "
                + ("nothing is held out of so few rows" if nothing else "the run is too short for one in between")
                + "; set data.eval or train.eval_every, or leave it out."
            )
