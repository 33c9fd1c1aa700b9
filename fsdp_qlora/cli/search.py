"""A sweep that Optuna steers, by its ask-and-tell interface. Needs the extra ``optuna``.

Not Hydra's Optuna plugin: it needs Optuna 2 (of 2022), runs trainings in its own process, and cannot go on after a
kill (docs/adr/0032). The study is a journal in the sweep's folder: JSON lines, which hold what was tried so far.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from fsdp_qlora.cli.jobs import Job, Jobs, Outcome
from fsdp_qlora.config.schema import SweepSettings
from fsdp_qlora.errors import STOPPED_EXIT_CODE, ConfigError
from fsdp_qlora.shown import visible
from fsdp_qlora.track.lines import read_lines

JOURNAL = "optuna.log"
"""File of the study in the sweep's folder."""
_OUTCOME = "outcome"
"""Attribute of a trial: its `Outcome`, once it counts."""
_STUDY = "fsdp_qlora"
_READ_SECONDS = 2.0
"""How often a training's metrics are read."""


def require_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        ConfigError: if not.
    """
    if find_spec("optuna") is None:
        raise ConfigError(
            "sweep.trials: needs Optuna, which is not installed; run `pip install 'fsdp-qlora[optuna]'`, or leave it "
            "out to train every combination."
        )


class Search:
    """Asks Optuna for values, trains with them, and tells it the result."""

    def __init__(
        self, folder: Path, settings: SweepSettings, seed: int, space: Mapping[str, tuple[Override, list[str] | None]]
    ) -> None:
        """Open the study of a sweep, or go on with it.

        Args:
            folder: the sweep's.
            settings: what to compare, and whether to prune.
            seed: of the choice of values.
            space: key -> its override, and the texts to choose from, or None for an interval.
        """
        optuna = importlib.import_module("optuna")
        journal = importlib.import_module("optuna.storages.journal")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._settings = optuna, settings
        storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(folder / JOURNAL)))
        self._study = optuna.create_study(
            storage=storage, study_name=_STUDY, load_if_exists=True,
            direction="maximize" if settings.maximize else "minimize",
            pruner=optuna.pruners.MedianPruner() if settings.prune else optuna.pruners.NopPruner(),
        )  # fmt: skip
        # A study that goes on must not draw its first values again.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(self._study.trials))
        self._space = {key: self._distribution(*each) for key, each in space.items()}
        self._ask_again()

    def _distribution(self, override: Override, options: list[str] | None) -> Any:
        kinds = self._optuna.distributions
        if options is not None:
            return kinds.CategoricalDistribution(options)
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        start, end, log = interval.start, interval.end, "log" in interval.tags
        if isinstance(start, int) and isinstance(end, int):
            return kinds.IntDistribution(start, end, log=log)
        return kinds.FloatDistribution(float(start), float(end), log=log)  # type: ignore[arg-type]

    def _ask_again(self) -> None:
        """Queue the values of trials that were cut short: their trainings go on from a checkpoint."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self._study.tell(trial.number, state=state.FAIL)
            self._study.enqueue_trial(trial.params)

    def earlier(self) -> list[Outcome]:
        """Return the outcomes of earlier starts."""
        told = (trial.user_attrs.get(_OUTCOME) for trial in self._study.get_trials(deepcopy=False))
        return [Outcome(**json.loads(text)) for text in told if text is not None]

    def train(self, jobs: Jobs, build: Callable[[Sequence[str]], Job]) -> Outcome:
        """Train with the values that Optuna asks for, and tell it the result unless the training was stopped.

        Raises:
            ConfigError: if a training has finished without the number that is searched by.
        """
        trial = self._study.ask(self._space)
        choices = [f"{key}={_spelt(trial.params[key])}" for key in self._space]
        label = f"[trial {trial.number + 1}]"
        try:
            job = build(choices)
        except ConfigError as error:  # these values do not go together, others may
            print(f"{label} not run: {visible(str(error))}", flush=True)
            outcome = Outcome(choices, "", error.exit_code, str(error))
        else:
            outcome = jobs.run(job, label, _Pruner(trial, job) if self._settings.prune else lambda: False)
        if outcome.code == STOPPED_EXIT_CODE and not outcome.pruned:
            return outcome  # asked again at the next start
        trial.set_user_attr(_OUTCOME, json.dumps(asdict(outcome)))
        value, states = outcome.values.get(self._settings.metric), self._optuna.trial.TrialState
        if value is not None:
            self._study.tell(trial, value)
            return outcome
        self._study.tell(trial, state=states.PRUNED if outcome.pruned else states.FAIL)
        if outcome.code == 0:
            raise ConfigError(
                f"sweep.metric: the summary.json of this training has no number {self._settings.metric}, so there is "
                "nothing to search by. For eval_loss_after, set data.eval or data.eval_fraction."
            )
        return outcome


def _spelt(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


class _Pruner:
    """Reports a training's held-out losses to Optuna as they come; says whether to stop it."""

    def __init__(self, trial: Any, job: Job) -> None:
        self._trial, self._file, self._reported, self._next = trial, job.folder.metrics_file, -1, 0.0

    def __call__(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _READ_SECONDS
        for line in read_lines(self._file) if self._file.is_file() else []:
            if "eval_loss" in line and line["step"] > self._reported:
                self._reported = line["step"]
                self._trial.report(line["eval_loss"], self._reported)
                if self._trial.should_prune():
                    return True
        return False
