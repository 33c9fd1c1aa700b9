"""`evaluate`: held-out loss by source, tasks and answers, of the base model or an adapter, or of both side by side."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.cli.tables import print_columns
from fsdp_qlora.config.answer_rules import has_rows
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.files.write import write_json
from fsdp_qlora.inference.harness import require_harness
from fsdp_qlora.inference.prompts import ANSWER
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.measure import Measured, measure, without_adapter
from fsdp_qlora.run.world import World
from fsdp_qlora.train.evaluate import Evaluation

BEFORE, AFTER = "base", "adapter"


def run(config: RunConfig) -> int:
    """Evaluate; return the exit code."""
    if config.evaluate.json:
        _require_place(Path(config.evaluate.json).expanduser())
    if config.evaluate.tasks:
        require_harness()
    if not has_rows(config):
        config = replace(config, data=replace(config.data, train=None))
    elif config.data.train is None:  # `prepare` needs training data; the evaluation rows serve as well
        config = replace(config, data=replace(config.data, train=config.data.eval))
    return on_ranks(config, lambda world: _evaluate(config, world))


def _require_place(file: Path) -> None:
    """Check that the result can be written, so that nothing is measured in vain.

    Raises:
        ConfigError: if it cannot.
    """
    if file.is_dir():
        raise ConfigError(f"evaluate.json: {file} is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise ConfigError(f"evaluate.json: there is no folder {file.parent}; make it, or name another one.")
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"evaluate.json: {file.parent} may not be written to; name another folder.")


def _evaluate(config: RunConfig, world: World) -> int:
    assert not isinstance(config.adapter, dict)  # check_verb
    adapter = Path(config.adapter).expanduser() if config.adapter else None
    prepared = load_for_inference(config, adapter, world)
    before = None
    if config.evaluate.compare:
        with without_adapter(prepared):
            before = measure(config, prepared)
    measured = measure(config, prepared)
    if not world.ranks.is_main:
        return 0
    if measured.rows is not None:
        print(_line(measured.rows))
    models = {AFTER if adapter else BEFORE: measured} if before is None else {BEFORE: before, AFTER: measured}
    _show_numbers(models)
    _show_answers(models)
    if config.evaluate.json:
        values = measured.values() | ({"before": before.values()} if before is not None else {})
        write_json(Path(config.evaluate.json).expanduser(), values)
    return 0


def _line(rows: Evaluation) -> str:
    metrics = "".join(f", {name} {value:.2f}" for name, value in rows.metrics.items())
    return f"loss {rows.loss:.4f}{metrics}, {rows.target_tokens} supervised tokens"


def _show_numbers(models: dict[str, Measured]) -> None:
    """Print a row for each number, with a column for each model; nothing if the line above says it all."""
    rows = {name: _numbers(measured) for name, measured in models.items()}
    names = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    if len(names) > 3 or (len(models) > 1 and names):
        lines = [[*name, *(rows[model].get(name, "") for model in models)] for name in names]
        print_columns("evaluation", ["on", "", *models], lines)


def _numbers(measured: Measured) -> dict[tuple[str, str], str]:
    """Return all numbers by source or task, and name."""
    rows, numbers = measured.rows, {}
    if rows is not None:
        parts = rows.sources if len(rows.sources) == 1 else {"all rows": rows, **rows.sources}
        for source, part in parts.items():
            numbers |= {(source, name): _shown(value) for name, value in part.values().items()}
            numbers[source, "target_tokens"] = _shown(part.target_tokens)
    for task, metrics in measured.tasks.items():
        numbers |= {(task, name): _shown(value) for name, value in metrics.items()}
    return numbers


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _show_answers(models: dict[str, Measured]) -> None:
    """Print each prompt with the models' answers side by side."""
    first = next(iter(models.values()))
    for number, line in enumerate(first.answers):
        asked = line["prompt"] if "prompt" in line else line["messages"][-1].get("content", "")
        answers = [measured.answers[number][ANSWER] for measured in models.values()]
        print_columns(str(asked), list(models), [answers])
