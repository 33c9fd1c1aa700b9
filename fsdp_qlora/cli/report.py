"""`report RUN [RUN ...]`: writes one page about a run, or several beside each other."""

from __future__ import annotations

import logging
from pathlib import Path

from fsdp_qlora.cli.quoting import command
from fsdp_qlora.errors import ConfigError, typed_line
from fsdp_qlora.report.page import PAGE, write_report
from fsdp_qlora.report.pictures import INSTALL, can_draw
from fsdp_qlora.report.record import run_folders
from fsdp_qlora.shown import visible
from fsdp_qlora.track.console import megabytes

_log = logging.getLogger(__name__)
USAGE = f"""usage: fsdp-qlora report RUN [RUN ...] [to=FILE.html]

Writes one HTML page about a run (outputs/NAME), or about several beside each other: curves, memory, time, data,
answers, settings, versions. A folder of several runs, such as a sweep, stands for all of them. The page needs no
network and no other file.

  RUN         a run's folder
  to=FILE     where to write it; by default RUN/{PAGE}, and ./{PAGE} for several runs"""


def run(arguments: list[str]) -> int:
    """Write the page; return the exit code."""
    paths, to = [], None
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key == "to" and value:
            to = Path(value).expanduser()
        elif word.startswith("-"):
            raise ConfigError(f"report: there is no option {word}.\n{USAGE}")
        else:
            paths.append(word)
    if not paths:
        raise ConfigError(f"report: name the folder of a run.\n{USAGE}")
    folders = run_folders(paths, "report")
    file = to or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    size = write_report(folders, file)
    missing = "" if can_draw() else f", without pictures: {INSTALL} adds them"
    print(visible(f"{file}: {len(folders)} run(s), {megabytes(size)}{missing}"), flush=True)
    return 0


def report_beside(folder: Path) -> None:
    """Write the page of a run that has just ended into its folder; a failure is reported and changes nothing else."""
    try:
        write_report([folder], folder / PAGE)
    except Exception as error:  # a full disk, a broken matplotlib: the run is over and its result is there
        again = command("report", str(folder))
        _log.warning("%s was not written (%s); `%s` tries again.", folder / PAGE, typed_line(error), again)
        return
    print(visible(f"report: {folder / PAGE}"), flush=True)
