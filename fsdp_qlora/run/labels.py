"""Settles what an objective's labels are before the model is built, because its head has an output for each."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice

from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.choices import WITH_LABELS
from fsdp_qlora.config.schema import ObjectiveSettings, RunConfig
from fsdp_qlora.data.prepare import columns_of
from fsdp_qlora.data.sources import names_of
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import on_main
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.objectives.labels import SINGLE, find_labels

_PLANNED = 2
"""Labels to plan for where neither settings nor data say how many there are."""


def settle_labels(config: RunConfig, ranks: Ranks) -> RunConfig:
    """Return the settings with the labels of the training data. Every rank calls it; rank 0 reads the rows.

    Raises:
        DataError: if rows cannot be read, or their labels are of several kinds.
        ConfigError: if there are no rows to read them from.
    """
    if not _is_open(config.objective):
        return config
    return _with(config, ObjectiveSettings(**on_main(lambda: asdict(labels_of(config)), ranks)))


def labels_of(config: RunConfig) -> ObjectiveSettings:
    """Return the objective's settings with the labels of the training data.

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
    column = kind.label_column
    return find_labels(islice(rows, data.max_rows or None), columns_of(data), objective, column)


def planned_labels(config: RunConfig) -> RunConfig:
    """Return the settings to plan with: with the data's labels, or two of them if there is no data."""
    if not _is_open(config.objective):
        return config
    if config.data.train is None and not config.objective.labels:
        names = [str(number) for number in range(_PLANNED)]
        return _with(config, replace(config.objective, labels=names, problem_type=SINGLE))
    return _with(config, labels_of(config))


def _is_open(objective: ObjectiveSettings) -> bool:
    known = objective.labels and asked(objective.problem_type) is not None
    return objective.name in WITH_LABELS and not known and objective.problem_type != "regression"


def _with(config: RunConfig, objective: ObjectiveSettings) -> RunConfig:
    return replace(config, objective=objective)
