"""MLflow as a sink: the same run after a resume, in a local database or on a server. Needs the extra ``mlflow``.

Through `MlflowClient`, which names the run at each call: the fluent API has one active run for the whole process.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora.config.track import TrackSettings
from fsdp_qlora.shown import shown_source
from fsdp_qlora.track.sink import Ended, Sink, State, numbers

ID_FILE = "mlflow_run_id"
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""How long to wait for a server, unless the environment says: MLflow's own defaults are 120 s and 7 further tries."""
_LONGEST = 6000
"""Characters of a parameter's value that MLflow takes (`mlflow.utils.validation.MAX_PARAM_VAL_LENGTH`)."""
_PARAMS = 100
"""Parameters that MLflow takes at once (`mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH`)."""
_ENDS = {State.FINISHED: "FINISHED", State.STOPPED: "KILLED", State.FAILED: "FAILED"}


def tracking_uri(settings: TrackSettings, output_root: str) -> str:
    """Return where runs are logged: the setting, else ``MLFLOW_TRACKING_URI``, else a database in ``output_root``."""
    root = Path(output_root).expanduser().absolute()
    return settings.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


class MlflowSink(Sink):
    """Logs metrics to one MLflow run, whose id is kept in the run folder."""

    def __init__(self, folder: Path, name: str, settings: TrackSettings, config: dict[str, Any]) -> None:
        for variable, value in _LIMITS.items():
            os.environ.setdefault(variable, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it lists each table of a new database
        entities = importlib.import_module("mlflow.entities")
        self._metric = entities.Metric
        uri = tracking_uri(settings, config["run"]["output_root"])
        self._client = importlib.import_module("mlflow.tracking").MlflowClient(uri)
        id_file = folder / ID_FILE
        if id_file.is_file():
            self._run = id_file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(settings.mlflow_experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(settings.mlflow_experiment)
        tags = {"fsdp_qlora.folder": shown_source(str(folder))}
        self._run = self._client.create_run(number, run_name=name, tags=tags).info.run_id
        id_file.write_text(self._run, encoding="utf-8")
        params = [entities.Param(key, text) for key, value in _flat(config) if 0 < len(text := str(value)) <= _LONGEST]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run, params=params[first : first + _PARAMS])

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the values that are numbers, together."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in numbers(values).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def rewind(self, step: int) -> None:
        """MLflow cannot delete logged steps; repeated ones appear twice, with the same ``step``."""

    def close(self) -> None:
        """Do nothing: each call has written what it was given."""

    def end(self, ended: Ended) -> None:
        """Log the summary as a file, and end the run."""
        if ended.summary:
            self._client.log_dict(self._run, ended.summary, "summary.json")
        if ended.message:
            self._client.set_tag(self._run, "fsdp_qlora.error", ended.message)
        self._client.set_terminated(self._run, _ENDS[ended.state])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
