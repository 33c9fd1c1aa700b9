"""Labels of rows: what the training data holds, and the number or vector that a row's label becomes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import ObjectiveSettings
from fsdp_qlora.data.encoder import Read
from fsdp_qlora.data.labels import IGNORE
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.messages import text_of
from fsdp_qlora.errors import ConfigError, DataError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""transformers' names of what labels are (``config.problem_type``)."""
MOST = 100_000
"""Labels; more of them would be numbers to predict, or a column of something else."""


@dataclass
class _Seen:
    """The labels seen so far."""

    names: set[str]
    largest: int = -1
    """Largest number; -1 if there was none."""
    several: bool = False
    fractions: bool = False
    sets: set[frozenset[str]] = field(default_factory=set)
    """Up to two different sets of labels that rows have."""

    def add(self, value: Any) -> None:
        """Take a row's label."""
        if isinstance(value, list | tuple | np.ndarray):
            self.several = True
            if len(self.sets) < 2:
                self.sets.add(frozenset(map(str, value)))
            for one in value:
                self.add(one)
        elif isinstance(value, float) and not value.is_integer():
            self.fractions = True
        elif isinstance(value, bool | int | float | np.integer | np.floating):
            self.largest = max(self.largest, int(_number(value)))
        else:
            self.names.add(_name(value))


def find_labels(
    rows: Iterable[Row], read: Read, settings: ObjectiveSettings, column: str, of_each: bool = False
) -> ObjectiveSettings:
    """Return the settings with the labels, and what they are, as the training rows have them.

    Rows that cannot be read are passed over; encoding them says why. With ``of_each``, the column lists a label for
    each part of a row (null or -100 where a part has none).

    Raises:
        DataError: if the labels are of different kinds, or there are none.
        ConfigError: if ``objective.class_weights`` are of labels that there are not, or of a loss without them.
    """
    seen, any_row = _Seen(set()), False
    for row in rows:
        try:
            value = read(row).get(column)
            if value is None:
                continue
            for one in labels_of_parts(value) if of_each else (value,):
                seen.add(one)
        except DataError:
            continue
        any_row = True
        if len(seen.names) > MOST or seen.largest > MOST:
            raise DataError(
                f"data: {row.where}: there are more than {MOST} labels; is {column!r} the right column? Numbers to "
                "predict need objective.problem_type=regression."
            )
    if not any_row:
        raise DataError(f"data.train: no row has a {column!r}; data.columns can rename another column to it.")
    fractions = seen.fractions or _are_fractions(seen.names)
    problem = asked(settings.problem_type) or (
        SINGLE if of_each else MULTI if seen.several else REGRESSION if fractions else SINGLE
    )
    if settings.class_weights and problem != SINGLE:
        raise ConfigError(
            f"objective.class_weights: only for one label of several ({SINGLE}), and these rows are {problem}."
        )
    if settings.labels or problem == REGRESSION:
        return replace(settings, problem_type=problem)  # type: ignore[arg-type]
    labels = _labels_seen(seen, problem, column)
    if unknown := [name for name in settings.class_weights if name not in labels]:
        raise ConfigError(
            f"objective.class_weights: {unknown[0]!r} is no label of data.train; the labels are "
            f"{', '.join(map(repr, labels[:10]))}."
        )
    return replace(settings, labels=labels, problem_type=problem)  # type: ignore[arg-type]


def _labels_seen(seen: _Seen, problem: str, column: str) -> list[str]:
    """Return the labels of rows, in order.

    Raises:
        DataError: if they are of different kinds, or tell no rows apart.
    """
    if seen.fractions:
        raise DataError(f"data.train: some labels are fractions, which objective.problem_type={problem} has none of.")
    if seen.names and seen.largest >= 0:
        raise DataError(
            f"data.train: some labels are names ({min(seen.names)!r}) and some are numbers ({seen.largest}); use one "
            "of them, or list the names in objective.labels in the order of their numbers."
        )
    by_name = sorted(seen.names, key=int) if _are_whole(seen.names) else sorted(seen.names)
    labels = by_name or [str(number) for number in range(seen.largest + 1)]
    if not labels:
        raise DataError(
            f"data.train: the rows' {column!r} hold no labels; data.columns can rename another column to it."
        )
    if len(labels) < 2 and problem == SINGLE:
        raise DataError(f"data.train: all rows have the same label, {labels[0]!r}; there is nothing to learn.")
    if problem == MULTI and len(seen.sets) == 1:
        raise DataError(
            f"data.train: all rows have the same labels ({', '.join(sorted(*seen.sets)) or 'none'}); there is nothing "
            f"to learn. {_LISTS}"
        )
    return labels


_LISTS = "A list holds the names or numbers of the labels that a row has, not a 0 or 1 for each of them."


def _are_whole(names: Iterable[str]) -> bool:
    """Whether names are whole numbers, as files without types have them (CSV)."""
    return all(re.fullmatch(r"-?[0-9]+", name) for name in names)


def _are_fractions(names: Collection[str]) -> bool:
    """Whether names are numbers, and not all of them whole: as files without types have what is to be predicted."""
    try:
        values = [float(name) for name in names]
    except ValueError:  # a word
        return False
    return all(map(math.isfinite, values)) and not all(value.is_integer() for value in values)


def labels_of_parts(value: Any) -> list[Any]:
    """Return the labels in a list of them, without those of parts that have none."""
    if not isinstance(value, list | tuple | np.ndarray):
        raise DataError(f"expected a list of labels, got {value!r}")
    return [one for one in value if not is_unlabelled(one)]


def is_unlabelled(value: Any) -> bool:
    """Whether a part of a row has no label: null, or torch's number for what is to be ignored."""
    return value is None or (isinstance(value, int | np.integer) and value == IGNORE)


class Labels:
    """Turns labels of rows into numbers."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.names, self.problem = list(settings.labels), settings.problem_type
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._whole = _are_whole(self.names)

    @property
    def num_outputs(self) -> int:
        """Outputs of the model's head: one for each label, or one number."""
        return 1 if self.problem == REGRESSION else len(self.names)

    def vector(self, value: Any) -> list[float]:
        """Return a row's label as numbers: its own number, 0 or 1 for each label, or the number to predict.

        Raises:
            DataError: if it is missing, unknown, out of range, or not of the kind that the others are.
        """
        if value is None:
            raise DataError("the row has no 'label'")
        if self.problem == REGRESSION:
            return [_number(value)]
        if self.problem == MULTI:
            if not isinstance(value, list | tuple | np.ndarray):
                raise DataError(f"expected a list of labels, got {value!r}")
            chosen = {self.number(one) for one in value}
            if len(chosen) < len(value):
                raise DataError(f"label {list(value)} names one twice. {_LISTS}")
            return [float(number in chosen) for number in range(len(self.names))]
        return [float(self.number(value))]

    def shown(self, vector: np.ndarray) -> str:
        """Return what `vector` has made of a label, for a reader."""
        if self.problem == REGRESSION:
            return f"{vector[0]:g}"
        if self.problem == SINGLE:
            return self.names[int(vector[0])]
        return ", ".join(name for name, there in zip(self.names, vector, strict=True) if there)

    def number(self, value: Any) -> int:
        """Return the number of one label.

        Raises:
            DataError: if there is no such label.
        """
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        if isinstance(value, bool | int | float | np.integer | np.floating):
            number = _number(value)
            if self._whole and number.is_integer() and str(int(number)) in self._numbers:
                return self._numbers[str(int(number))]  # "3" is the name of 3, wherever it stands
            if self._whole or not number.is_integer() or not 0 <= number < len(self.names):
                numbered = f"numbered from {self.names[0]}" if self._whole else "numbered from 0"
                raise DataError(f"label {value} is out of range: there are {len(self.names)} labels, {numbered}")
            return int(number)
        name = _name(value)
        if name not in self._numbers:
            some = ", ".join(map(repr, self.names[:10])) + (" ..." if len(self.names) > 10 else "")
            raise DataError(f"unknown label {name!r}; the labels are {some}")
        return self._numbers[name]


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"label {value!r} is not a number") from error
    if not math.isfinite(number):
        raise DataError(f"label {value!r} is not a finite number")
    return number


def _name(value: Any) -> str:
    name = text_of(value)
    if not name.strip():
        raise DataError("the label is empty")
    return name


def label_maps(labels: Labels) -> Mapping[str, Any]:
    """Return what a transformers config says of labels."""
    names = labels.names or [f"LABEL_{number}" for number in range(labels.num_outputs)]
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": labels.problem,
    }
