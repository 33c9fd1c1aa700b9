"""`fsdp-qlora VERB [overrides]` or `torchrun -m fsdp_qlora VERB [overrides]`: composes, checks, and runs the verb."""

from fsdp_qlora.files.module_path import leave_here

if __name__ == "__main__":  # before any other import: -m has put the current folder first on sys.path
    leave_here()

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from fsdp_qlora.cli.launcher import launch, ranks_to_start
from fsdp_qlora.cli.logs import listen
from fsdp_qlora.cli.output import restart_in_utf8, withstand
from fsdp_qlora.cli.quiet import quieten
from fsdp_qlora.config.choices import nearest
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.distributed.meeting import MEETING_VARIABLE
from fsdp_qlora.distributed.parent import die_with_parent, die_with_sweep
from fsdp_qlora.distributed.signals import STOP_SIGNALS, take_signals
from fsdp_qlora.distributed.torchrun import forget_leftovers, is_rank, num_ranks_of
from fsdp_qlora.errors import STOPPED_EXIT_CODE, ConfigError, StorageError
from fsdp_qlora.run.exit import CONFIG_VARIABLE, EXIT_VARIABLE, end_by_signal, guarded, leave
from fsdp_qlora.track.bars import show_bars

VERBS = {
    "train": "fine-tune a model and write its adapter",
    "prepare": "fetch the embedded model and data (experiment=quickstart), tokenize the data",
    "plan": "show what a run would do and the memory it needs, without weights",
    "evaluate": "loss and metrics of a base or an adapter on data.eval",
    "generate": "answer a prompt, with or without an adapter",
    "export": "write an adapter, the quantized base (what=base-4bit), or both merged (what=merged)",
    "inspect": "show a checkpoint, or compare two: inspect PATH [PATH]",
    "report": "write one page about a run, or several beside each other: report RUN [RUN ...]",
    "watch": "follow a run, or the runs of a sweep, in the terminal: watch RUN",
    "doctor": "show devices, versions and problems found",
}
ON_RANKS = ("train", "evaluate", "generate")
"""Verbs that can run on several ranks."""
OF_PATHS = ("inspect", "report", "watch")
"""Verbs that take paths instead of settings."""


def usage() -> str:
    """Return the usage text with the list of verbs."""
    lines = "\n".join(f"  {name:10}{text}" for name, text in VERBS.items())
    return (
        f"usage: fsdp-qlora VERB [key=value ...]\n\n{lines}\n\n"
        "fsdp-qlora VERB --help shows the verb's settings; --cfg job prints the composed ones."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code of the process."""
    withstand()
    listen()
    show_bars()
    if arguments is None:
        leave_here()
        restart_in_utf8()
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    verb, rest = words[0], words[1:]
    if note := forget_leftovers(os.environ, (CONFIG_VARIABLE, EXIT_VARIABLE, MEETING_VARIABLE)):
        print(f"fsdp-qlora: {note}", file=sys.stderr, flush=True)
    if is_rank(os.environ):
        die_with_parent()
    else:
        die_with_sweep()
    if verb == "train" and arguments is None:  # until its own handlers take over; nothing is lost before
        take_signals(STOP_SIGNALS, end_by_signal)
    code = guarded(lambda: _run(verb, rest))
    if verb in ON_RANKS and arguments is None:
        leave(code)
    return code


def _run(verb: str, arguments: list[str]) -> int:
    _require_current_folder()
    if verb not in VERBS:
        raise ConfigError(f"{verb}: there is no such verb.{nearest(verb, VERBS)}\n{usage()}")
    if arguments[:1] in (["--help"], ["-h"]) and verb != "inspect":  # which prints its own
        print(_help(verb, arguments[1:2]))
        return 0
    if verb in OF_PATHS:
        quieten()
        return import_module(f"fsdp_qlora.cli.{verb}").run(arguments)
    if (composed := os.environ.get(CONFIG_VARIABLE)) is not None:  # our launcher has composed it for all ranks
        return _verb(verb, from_dict(json.loads(Path(composed).read_text(encoding="utf-8"))))
    compose = import_module("fsdp_qlora.cli.compose")
    line = compose.split(arguments)
    if verb == "train" and compose.is_sweep(line):
        return import_module("fsdp_qlora.cli.sweep").run(arguments, line)
    if line.flags:
        return compose.hydra_main(verb, line, lambda config: _verb(verb, config))
    return _verb(verb, compose.compose_config(verb, arguments))


def _help(verb: str, group: list[str]) -> str:
    """Return what a verb does, and the settings that it reads, or those of one group."""
    if verb in OF_PATHS:
        return import_module(f"fsdp_qlora.cli.{verb}").USAGE
    return import_module("fsdp_qlora.cli.help").show(verb, VERBS[verb], *group)


def _require_current_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise StorageError(f"the current folder cannot be used ({error.strerror}); change to another one.") from error


def _verb(verb: str, config: RunConfig) -> int:
    """Launch the ranks that the settings ask for, or run the verb in this process."""
    check_verb(verb, config)
    if verb == "generate" and config.generate.device_map is not None and num_ranks_of(os.environ) > 1:
        raise ConfigError(
            "generate.device_map: one process drives all devices; start it without torchrun, or leave device_map out, "
            "and the base is sharded over the ranks."
        )
    quieten()
    if verb in ON_RANKS and not is_rank(os.environ) and (num_ranks := ranks_to_start(config)) > 1:
        started = time.time()
        code = launch(verb, config, num_ranks)
        if verb == "train" and code not in (0, STOPPED_EXIT_CODE):
            import_module("fsdp_qlora.cli.report").report_failure(config, code, started)
        return code
    return import_module(f"fsdp_qlora.cli.{verb}").run(config)


if __name__ == "__main__":
    sys.exit(main())
