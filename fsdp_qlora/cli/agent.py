"""Runs torch's elastic agent in its own process.

``python -m fsdp_qlora.cli.agent RANKS VERB PARENT RESTARTS``, where PARENT is the launcher's process id.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from fsdp_qlora.distributed.parent import die_with_parent

die_with_parent(int(sys.argv[3]) if __name__ == "__main__" else None)  # before torch, whose import takes seconds

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fsdp_qlora.cli.output import withstand
from fsdp_qlora.distributed.meeting import MEETING_VARIABLE
from fsdp_qlora.distributed.signals import heeded
from fsdp_qlora.run.exit import EXIT_VARIABLE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def main() -> int:
    """Start the ranks and wait for them; return 0 if all succeeded."""
    withstand()
    num_ranks, verb, max_restarts = int(sys.argv[1]), sys.argv[2], int(sys.argv[4])
    logging.disable(logging.ERROR)  # the parent reports errors in one line; torch's loggers each have their own level
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint=str(Path(os.environ[MEETING_VARIABLE]) / "rendezvous"),
        # Not a TCP store: data from the store is unpickled, and others could reach its port.
        rdzv_configs={"store_type": "file"},
        run_id=f"fsdp_qlora-{os.getpid()}",
        max_restarts=max_restarts,
        signals_to_handle=",".join(signal.Signals(number).name for number in heeded(_SIGNALS)),
        logs_specs=DefaultLogsSpecs(str(Path(os.environ[EXIT_VARIABLE]).with_name("logs"))),  # not left in TMPDIR
        local_addr="127.0.0.1",  # else the host name, which may not resolve
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "fsdp_qlora", verb)
    except ChildFailedError as error:
        # A rank killed by a signal reports nothing; errors on the others are consequences.
        # SIGTERM does not count, because this agent ends the other ranks with it.
        rank, failure = min(error.failures.items(), key=lambda item: (not _killed(item[1].exitcode), item[1].timestamp))
        _tell(rank, failure.exitcode)
        return 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _killed(code: int) -> bool:
    return code < 0 and code != -signal.SIGTERM


def _tell(rank: int, code: int) -> None:
    Path(os.environ[EXIT_VARIABLE]).with_name("agent.json").write_text(json.dumps({"rank": rank, "code": code}))


if __name__ == "__main__":
    sys.exit(main())
