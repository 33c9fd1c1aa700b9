"""Judges a finished run by its metrics.jsonl, and says what to do next."""

from __future__ import annotations

from typing import Any

from fsdp_qlora.checkpoint.publish import complete_checkpoints, step_folder
from fsdp_qlora.plan.recipe import usual_rate
from fsdp_qlora.run.decide import shape_of
from fsdp_qlora.run.training import Training
from fsdp_qlora.track.lines import read_lines
from fsdp_qlora.train.outcome import NOTHING_LEARNED, OVERFITS, STILL_FALLING, Facts, Outcome, judge


def verdict_on(training: Training) -> dict[str, Any] | None:
    """Return the ``verdict`` of summary.json; None if there are too few numbers to judge by. Rank 0 calls it."""
    file = training.folder.metrics_file
    lines = read_lines(file) if file.is_file() else []
    curves = [[(line["step"], line[key]) for line in lines if key in line] for key in ("eval_loss", "loss")]
    outcome = judge(curves[0], curves[1], facts_of(training))
    if outcome is None:
        return None
    best = step_folder(training.folder.checkpoints, outcome.best_step)
    kept = best in complete_checkpoints(training.folder.checkpoints)
    told: dict[str, Any] = {"best_checkpoint": str(best) if kept and outcome.held_out else None}
    return outcome.to_dict() | told | {"next": next_settings(outcome, training, kept)}


def facts_of(training: Training) -> Facts:
    """Return what else is known of a run."""
    prepared, progress = training.prepared, training.progress
    linears, lora = prepared.shapes.linears, prepared.config.lora
    shape = shape_of(prepared.model.base, prepared.shapes)
    chosen = training.objective.name == "sft"  # others learn all that their rows have, or a label for each row
    return Facts(
        steps=progress.step, lr=training.recipe.lr, usual_lr=usual_rate(lora, prepared.config.optim, shape),
        tokens=progress.tokens, target_tokens=progress.target_tokens if chosen else progress.tokens,
        adapted=1.0 if lora.trains_base or not linears else len(prepared.plan.targets) / len(linears),
    )  # fmt: skip


def next_settings(outcome: Outcome, training: Training, kept: bool) -> list[str]:
    """Return the settings of the run to make next, as ``key=value``; none where there is none to recommend.

    Args:
        outcome: how the run ended.
        training: the run.
        kept: whether its best checkpoint is there.
    """
    train, recipe = training.config.train, training.recipe
    by_steps = train.max_steps > 0
    longer = f"train.max_steps={2 * train.max_steps}" if by_steps else f"train.num_epochs={2 * recipe.num_epochs:g}"
    if outcome.word == STILL_FALLING:
        return [longer]
    if outcome.word == OVERFITS and not kept:
        if recipe.eval_every and outcome.best_step:
            return [f"checkpoint.every_steps={recipe.eval_every}", "checkpoint.keep_best=1"]
        return [f"train.max_steps={max(1, outcome.last_step // 2)}"]
    if outcome.word == NOTHING_LEARNED:
        remedies = {
            "steps": longer, "lr": "optim.lr=auto", "supervised": "data.train_on=all",
            "linears": "lora.target_modules=all-linear",
        }  # fmt: skip
        remedy = remedies.get(outcome.reasons[0].kind)
        return [remedy] if remedy else []
    return []
