"""What `evaluate` measures of a model: loss on held-out rows, tasks, and answers; of an adapter, and of its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_qlora.config.answer_rules import has_rows
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ModelError
from fsdp_qlora.inference.end_of_turn import end_of_turn
from fsdp_qlora.inference.harness import Work, run_tasks
from fsdp_qlora.run.answers import answer_again, sampling_seed
from fsdp_qlora.run.evaluate import evaluate_prepared
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.train.evaluate import Evaluation

_ONLY = "default"
"""PEFT's name for an adapter that was given none."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model. Tasks and answers are there on rank 0 only."""

    rows: Evaluation | None = None
    """On the held-out rows, if there are any."""
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of each task, by the names that lm-evaluation-harness gives them."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """The lines of ``evaluate.prompts``, each with its answer."""

    def values(self) -> dict[str, Any]:
        """Return everything as written to ``evaluate.json``."""
        values: dict[str, Any] = {}
        if self.rows is not None:
            values |= _values(self.rows)
            values["sources"] = {name: _values(part) for name, part in self.rows.sources.items()}
        if self.tasks:
            values["tasks"] = self.tasks
        if self.answers:
            values["answers"] = self.answers
        return values


def _values(rows: Evaluation) -> dict[str, Any]:
    return {**rows.values(), "target_tokens": rows.target_tokens}


def measure(config: RunConfig, prepared: Prepared) -> Measured:
    """Measure a prepared model as ``evaluate`` asks for. Every rank calls it.

    Raises:
        ConfigError: if a task is unknown, or asks for what is not supported.
        DataError: if there is nothing to evaluate on, or it cannot be read.
    """
    asked = config.evaluate
    rows = evaluate_prepared(prepared) if has_rows(config) else None
    tasks = run_tasks(_work(config, prepared), asked) if asked.tasks else {}
    file = None if asked.prompts is None else Path(asked.prompts).expanduser()
    answers = [] if file is None else answer_again(config, prepared, file, "evaluate.prompts")
    return Measured(rows, tasks, answers)


def _work(config: RunConfig, prepared: Prepared) -> Work:
    end = end_of_turn(prepared.folder, prepared.model.base.config, prepared.tokenizer)
    return Work(
        prepared.model, prepared.tokenizer, end, prepared.shapes.max_positions, config.train.eval_batch_size,
        config.generate.batch_size, sampling_seed(config), prepared.ranks,
    )  # fmt: skip


@contextmanager
def without_adapter(prepared: Prepared) -> Iterator[None]:
    """Compute with the base alone inside, and with the adapter again afterwards.

    Raises:
        ModelError: if the adapter is more than what can be switched off.
    """
    lora = prepared.config.lora
    if lora.start is not None or prepared.config.model.add_tokens:
        what = f"started from the base weights ({lora.start})" if lora.start is not None else "has rows of added tokens"
        raise ModelError(
            f"evaluate.compare: the adapter {what}, so the model without it is not the base; evaluate the base in a "
            "command of its own, without adapter."
        )
    prepared.model.use_adapter(None)
    try:
        yield
    finally:
        prepared.model.use_adapter(_ONLY)
