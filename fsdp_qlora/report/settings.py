"""A run's settings beside the defaults, and beside those of other runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fsdp_qlora.config.convert import known_keys, to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.report.record import Run

MISSING = "not there"
"""Stands for a setting that a run's config.yaml lacks, because another version wrote it."""


@dataclass(frozen=True)
class Setting:
    """One setting of a run."""

    key: str
    value: str
    default: str

    @property
    def differs(self) -> bool:
        """Whether it is not the default."""
        return self.value != self.default


def settings_of(run: Run) -> list[Setting]:
    """Return all settings in the order of the schema, with keys that it does not know at the end.

    The default is what `fsdp-qlora train` takes when nothing is set.
    """
    defaults = to_dict(RunConfig())
    known = known_keys(RunConfig)
    keys = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]  # no whole groups
    keys += [key for key in _keys(run.config) if not any(key == k or key.startswith(f"{k}.") for k in keys)]
    return [Setting(key, _spelt(run.config, key), _spelt(defaults, key)) for key in keys]


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings and versions that are not equal in all runs: key -> its value in each run.

    A run whose version lacked a setting counts as one with the default.
    """
    tables = [
        {each.key: each.default if each.value == MISSING else each.value for each in settings_of(run)}
        | {f"version of {name}": str(version) for name, version in run.versions.items()}
        for run in runs
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table.get(key, MISSING) for table in tables] for key in keys}
    return [(key, each) for key, each in values.items() if len(set(each)) > 1]


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _spelt(values: Any, key: str) -> str:
    """Return a setting's value as JSON writes it, but texts without quotes."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return MISSING
        values = values[part]
    return values if isinstance(values, str) else json.dumps(values, ensure_ascii=False, default=str)
