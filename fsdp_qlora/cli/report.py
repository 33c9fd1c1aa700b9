"""`report RUN [RUN ...]`: writes one page about a run, or several beside each other."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from fsdp_qlora.cli.quoting import command
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, typed_line
from fsdp_qlora.files.read import parse_json
from fsdp_qlora.files.write import write_json
from fsdp_qlora.report.page import PAGE, write_report
from fsdp_qlora.report.pictures import INSTALL, can_draw
from fsdp_qlora.report.record import read_run, run_folders
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import megabytes

_log = logging.getLogger(__name__)
USAGE = f"""usage: fsdp-qlora report RUN [RUN ...] [to=FILE.html] [simulate=true]

Writes one HTML page about a run (outputs/NAME), or about several beside each other: curves, memory, time, data,
answers, settings, versions. A folder of several runs, such as a sweep, stands for all of them. The page needs no
network and no other file.

  RUN            a run's folder
  to=FILE        where to write it; by default RUN/{PAGE}, and ./{PAGE} for several runs
  simulate=true  first simulate a step of each run (`plan plan.simulate=true`) and keep the plan in RUN/plan.json, so
                 that the page has the simulated memory beside the planned and the measured"""


def run(arguments: list[str]) -> int:
    """Write the page; return the exit code."""
    paths, to, simulate = [], None, False
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key == "to" and value:
            to = Path(value).expanduser()
        elif equals and key == "simulate" and value in ("true", "false"):
            simulate = value == "true"
        elif word.startswith("-"):
            raise ConfigError(f"report: there is no option {word}.\n{USAGE}")
        else:
            paths.append(word)
    if not paths:
        raise ConfigError(f"report: name the folder of a run.\n{USAGE}")
    folders = run_folders(paths, "report")
    for folder in folders if simulate else ():
        _simulate(folder)
    file = to or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    size = write_report(folders, file)
    missing = "" if can_draw() else f", without pictures: {INSTALL} adds them"
    print(visible(f"{file}: {len(folders)} run(s), {megabytes(size)}{missing}"), flush=True)
    return 0


def _simulate(folder: Path) -> None:
    """Run `plan` with simulation in a process of its own, as it needs torch, and keep what it prints.

    Raises:
        ConfigError: if it fails, with its message.
    """
    world_size = read_run(folder).start.get("world_size")
    ranks = [f"plan.world_size={world_size}"] if isinstance(world_size, int) else []
    words = ["plan", f"run_from={folder / 'config.yaml'}", "plan.simulate=true", "plan.json=true", *ranks]
    print(visible(f"simulating a step of {folder.name}"), flush=True)
    ran = subprocess.run(
        [sys.executable, "-m", "fsdp_qlora", *words],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    _, brace, rest = ran.stdout.partition("{\n")  # notes may stand before it
    if ran.returncode != 0 or not brace:
        raise ConfigError(f"report: simulate=true: `{command(*words)}` failed: {ran.stderr.strip() or ran.returncode}")
    write_json(folder / "plan.json", parse_json(f"{brace}{rest}".encode()))


def report_beside(folder: Path, aloud: bool = True) -> None:
    """Write the page of a run that has just ended into its folder; a failure is reported and changes nothing else.

    ``aloud``: print where it is.
    """
    try:
        write_report([folder], folder / PAGE)
    except Exception as error:  # a full disk, a broken matplotlib: the run is over and its result is there
        again = command("report", str(folder))
        _log.warning("%s was not written (%s); `%s` tries again.", folder / PAGE, typed_line(error), again)
        return
    if aloud:
        print(visible(f"report: {folder / PAGE}"), flush=True)


def report_failure(config: RunConfig, code: int, since: float) -> None:
    """Write the page of a run that several ranks have ended with ``code``, if it got to train; print nothing.

    What the ranks said stays the last line on the screen. A start that never had the folder has not ended it since
    then, in seconds since 1970, and leaves it alone.
    """
    folder = RunFolder(config.run.output_root, config.run.name)
    ending = folder.read_exit()
    ours = ending is not None and ending["code"] == code and ending["time"] >= since
    if ours and folder.metrics_file.is_file():
        report_beside(folder.path, aloud=False)
