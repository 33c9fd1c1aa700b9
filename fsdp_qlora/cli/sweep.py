"""`train --multirun`: trains every combination of ``key=a,b``, or those that a search chooses, and compares them.

Hydra's own sweeper runs jobs in its own process, ends with the first that fails, and starts all over again; so only its
grammar is used here. A plugin of Hydra's (``hydra/launcher=...``) still gets the whole sweep (`compose.hydra_main`).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from fsdp_qlora.cli.compose import MULTIRUN, CommandLine, require_right
from fsdp_qlora.cli.jobs import Job, Jobs, Outcome, build_job, job_name
from fsdp_qlora.cli.overrides import group_options, parsed
from fsdp_qlora.cli.quoting import command
from fsdp_qlora.cli.search import Search, require_optuna
from fsdp_qlora.cli.tables import print_columns
from fsdp_qlora.config.schema import SweepSettings
from fsdp_qlora.distributed.torchrun import is_rank
from fsdp_qlora.errors import STOPPED_EXIT_CODE, ConfigError
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import megabytes

_REPORT = "fsdp_qlora.cli.report"
"""The module of the verb that compares runs in one page: `fsdp-qlora report FOLDER ... to=FILE`."""


def run(arguments: Sequence[str], line: CommandLine) -> int:
    """Run a sweep; return the exit code: that of the first job that failed, 75 if stopped, else 0.

    Raises:
        ConfigError: if the command line is wrong, before any job is started.
    """
    _require_no_ranks(arguments)
    require_right("train", line)
    swept = [override for override in parsed(line.overrides) if override.is_sweep_override()]
    if not swept:
        raise ConfigError("--multirun: no key has several values; leave it out, or write key=a,b.")
    keys = {override.key_or_group for override in swept}
    fixed = [a for a in arguments if a not in MULTIRUN and a.partition("=")[0].lstrip("+") not in keys]
    example, name = _first_that_fits(fixed, swept, line.config_dir)
    if example.config.sweep.trials:
        require_optuna()
        return _search(fixed, swept, line, example, name)
    return _every_combination(fixed, swept, line, example, name)


def _first_that_fits(fixed: Sequence[str], swept: Sequence[Override], config_dir: str | None) -> tuple[Job, str]:
    """Return the first combination without an error, which tells the settings of the sweep, and the sweep's name.

    Raises:
        ConfigError: if all of them are wrong.
    """
    each = [[f"{o.get_key_element()}={v}" for v in _options(o, config_dir) or [_start(o)]] for o in swept]
    refused: list[str] = []
    for choices in itertools.product(*each):
        try:
            return build_job(fixed, choices, None)
        except ConfigError as error:
            refused.append(f"{', '.join(choices)}: {error}")
    raise ConfigError("\n".join(refused))


def _require_no_ranks(arguments: Sequence[str]) -> None:
    if is_rank(os.environ):
        ranks = os.environ["WORLD_SIZE"]
        right = command("train", *arguments, f"launcher.nproc_per_node={ranks}")
        raise ConfigError(
            f"--multirun: each training of a sweep starts its own ranks, so torchrun cannot start them. Run: {right}"
        )


def values_of(override: Override, config_dir: str | None) -> list[str]:
    """Return the values of a swept override as texts, in order; ``glob(*)`` stands for the options of its group.

    Raises:
        ConfigError: if they cannot be listed.
    """
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        return value.filter(group_options(key, config_dir))
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{key}: an interval has no list of values; say how many trainings a search may take: sweep.trials=20."
        )
    return list(override.sweep_string_iterator())


def _every_combination(
    fixed: Sequence[str], swept: Sequence[Override], line: CommandLine, example: Job, name: str
) -> int:
    each = [[f"{o.get_key_element()}={value}" for value in values_of(o, line.config_dir)] for o in swept]
    built: list[Job] = []
    refused = False
    for choices in itertools.product(*each):
        try:
            built.append(build_job(fixed, choices, name)[0])
        except ConfigError as error:
            refused = True
            print(f"fsdp-qlora: not run: {', '.join(choices)}: {visible(str(error))}", file=sys.stderr, flush=True)
    jobs = Jobs(_root(example))
    outcomes: list[Outcome] = []
    with jobs.begun():
        for number, job in enumerate(built, 1):
            if not jobs.stopped:
                outcomes.append(jobs.run(job, f"[{number}/{len(built)}]"))
    return _compare(jobs, outcomes, example.config.sweep, len(built), ConfigError.exit_code if refused else 0)


def _search(fixed: Sequence[str], swept: Sequence[Override], line: CommandLine, example: Job, name: str) -> int:
    jobs, settings = Jobs(_root(example)), example.config.sweep
    with jobs.begun():
        space = {o.get_key_element(): (o, _options(o, line.config_dir)) for o in swept}
        search = Search(jobs.root.path, settings, example.config.run.seed, space)
        outcomes = search.earlier()
        while len(outcomes) < settings.trials and not jobs.stopped:
            outcomes.append(search.train(jobs, lambda choices: build_job(fixed, choices, name)[0]))
    return _compare(jobs, outcomes, settings, settings.trials, 0)


def _options(override: Override, config_dir: str | None) -> list[str] | None:
    """Return the values to choose from; None for an interval."""
    listed = isinstance(override.value(), Glob) or override.is_discrete_sweep()
    return values_of(override, config_dir) if listed else None


def _start(override: Override) -> str:
    """Return the lowest value of an interval."""
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return str(interval.start)


def _root(job: Job) -> RunFolder:
    """Return the sweep's folder, of which the jobs' are subfolders."""
    return RunFolder(job.config.run.output_root, str(Path(job.config.run.name).parent))


def _compare(jobs: Jobs, outcomes: Sequence[Outcome], settings: SweepSettings, total: int, code: int) -> int:
    """Print what became of all jobs, the best first; return the exit code of the sweep."""
    metric, sign = settings.metric, -1 if settings.maximize else 1
    ranked = sorted(outcomes, key=lambda outcome: sign * outcome.values.get(metric, sign * float("inf")))
    keys = [choice.partition("=")[0].lstrip("+") for choice in ranked[0].choices] if ranked else []
    loss = metric == "eval_loss_after"
    header = [*keys, *(["held-out loss"] if loss else [metric]), "tokens/s", "peak memory", "result"]
    rows = [[*(choice.partition("=")[2] for choice in each.choices), *_row(each, metric)] for each in ranked]
    print_columns(f"{jobs.root.path.name}: {len(outcomes)} of {total} jobs", header, rows)
    for outcome in ranked:
        if outcome.message and outcome.code:
            print(f"{','.join(outcome.choices)}: {visible(outcome.message)}")
    done = [outcome for outcome in ranked if outcome.code == 0 and metric in outcome.values]
    if done:
        print(f"best: {','.join(done[0].choices)} ({metric} {done[0].values[metric]:.4f})", flush=True)
    elif ranked and all(outcome.code == 0 for outcome in ranked):
        print(f"sweep.metric: no job has a number {metric} in its summary.json, so none is the best.", flush=True)
    _report([jobs.root.path / job_name(outcome.choices) for outcome in done], jobs.root.path / "report.html")
    if jobs.stopped:
        print("stopped by a signal; the same command goes on.", flush=True)
        return STOPPED_EXIT_CODE
    failed = [outcome.code for outcome in outcomes if outcome.code and not outcome.pruned]
    return failed[0] if failed else code


def _row(outcome: Outcome, metric: str) -> list[str]:
    values = outcome.values
    measured = f"{values[metric]:.4f}" if metric in values else "-"
    if metric == "eval_loss_after" and metric in values and "eval_loss_before" in values:
        measured = f"{values['eval_loss_before']:.4f} -> {measured}"
    speed = f"{values['tokens_per_second']:.0f}" if "tokens_per_second" in values else "-"
    memory = megabytes(outcome.peak_memory_bytes) if outcome.peak_memory_bytes else "-"
    stopped = "pruned" if outcome.pruned else "stopped" if outcome.code == STOPPED_EXIT_CODE else ""
    return [measured, speed, memory, "done" if outcome.code == 0 else stopped or f"failed ({outcome.code})"]


def _report(folders: Sequence[Path], page: Path, has: Callable[[str], object] = find_spec) -> None:
    """Write the page that compares the runs, where this version has that verb; its failure fails no sweep."""
    if len(folders) < 2 or not has(_REPORT):
        return
    words = ["report", *map(str, folders), f"to={page}"]
    done = subprocess.run([sys.executable, "-m", "fsdp_qlora", *words], check=False)
    if done.returncode:
        print(f"fsdp-qlora: {command(*words)} failed ({done.returncode}).", file=sys.stderr, flush=True)
