"""Settles what an objective's labels are before the model is built, because its head has an output for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from fsdp_qlora.config.auto import asked, number
from fsdp_qlora.config.choices import WITH_LABELS
from fsdp_qlora.config.schema import ObjectiveSettings, RunConfig
from fsdp_qlora.data.prepare import columns_of
from fsdp_qlora.data.sources import names_of
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_main
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.objectives.labels import REGRESSION, SINGLE, find_labels

_PLANNED = 2
"""Labels to plan for where neither settings nor data say how many there are."""


def settle_labels(config: RunConfig, folder: Path, ranks: Ranks, adapter: Path | None = None) -> RunConfig:
    """Return the settings with the labels of the training data. Every rank calls it; rank 0 reads the rows.

    ``folder`` is the model's, and ``adapter`` one that was trained on labels: then they are those in its config.json.

    Raises:
        DataError: if rows cannot be read, or their labels are of several kinds.
        ConfigError: if there are no rows to read them from.
    """
    if not _is_open(config.objective):
        return config

    def settle() -> dict[str, Any]:
        return asdict(labels_of(config, folder) if adapter is None else trained_labels(config.objective, adapter))

    return _with(config, ObjectiveSettings(**on_main(settle, ranks)))


def trained_labels(objective: ObjectiveSettings, adapter: Path) -> ObjectiveSettings:
    """Return the objective's settings with the labels of an adapter.

    Raises:
        ModelError: if its folder does not say what they are.
    """
    file = adapter / "config.json"
    try:
        config = read_json(own_file(adapter, file.name), dict[str, Any])
        named = {int(label): str(name) for label, name in config["id2label"].items()}
        problem = config["problem_type"]
        labels = [] if problem == REGRESSION else [named[label] for label in range(len(named))]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{file} does not say what the labels are ({type(error).__name__}: {error}). Set objective.labels and "
            "objective.problem_type as they were in training."
        ) from error
    return replace(objective, labels=labels, problem_type=problem)


def labels_of(config: RunConfig, folder: Path) -> ObjectiveSettings:
    """Return the objective's settings with the labels of the training data, in the order of the model in ``folder``.

    Raises:
        ConfigError: if there are no rows to read them from.
        DataError: as `find_labels`.
    """
    objective, data = config.objective, config.data
    if not _is_open(objective):
        return objective
    if data.train is None:
        if objective.labels:
            return replace(objective, problem_type=SINGLE)
        raise ConfigError(
            "objective.labels: not set, and there is no data.train to read them from; list them in the order of their "
            "numbers."
        )
    kind = build_objective(objective)
    rows = (row for name in names_of(data.train) for row in kind.raw_rows(name))
    rows = islice(rows, data.max_rows or None)
    settled = find_labels(rows, columns_of(data), objective, kind.label_column, kind.label_of_each)
    return settled if objective.labels else replace(settled, labels=_as_trained(settled.labels, folder))


def _as_trained(labels: Sequence[str], folder: Path) -> list[str]:
    """Return the labels in the order of the model's own, if it has the same ones: its head may be in its files."""
    file = folder / "config.json"
    named = read_json(own_file(folder, file.name), dict[str, Any]).get("id2label") if file.is_file() else None
    if not isinstance(named, dict) or not all(str(number).isdecimal() for number in named):
        return list(labels)
    own = [str(named[number]) for number in sorted(named, key=int)]
    return own if set(own) == set(labels) and len(own) == len(labels) else list(labels)


def planned_labels(config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings to plan with: with the data's labels, or two of them if there is no data."""
    if not _is_open(config.objective):
        return config
    if config.data.train is None and not config.objective.labels:
        names = [str(label) for label in range(_PLANNED)]
        return _with(config, replace(config.objective, labels=names, problem_type=SINGLE))
    return _with(config, labels_of(config, folder))


def require_metrics(config: RunConfig) -> None:
    """Check that what computes the metrics of held-out rows is installed.

    Raises:
        ConfigError: naming what is missing.
    """
    held_out = config.data.eval is not None or number(config.data.eval_fraction) != 0
    names = build_objective(config.objective).packages if held_out else ()
    if missing := [name for name in names if find_spec(name) is None]:
        raise ConfigError(
            f"objective={config.objective.name}: its metrics need packages that are not installed "
            f"({', '.join(missing)}): pip install 'fsdp-qlora[tasks]'."
        )


def _is_open(objective: ObjectiveSettings) -> bool:
    known = objective.labels and asked(objective.problem_type) is not None
    return objective.name in WITH_LABELS and not known and objective.problem_type != REGRESSION


def _with(config: RunConfig, objective: ObjectiveSettings) -> RunConfig:
    return replace(config, objective=objective)
