"""``python -m fsdp_qlora.simulate PARENT``: simulates the settings on stdin for `fsdp_qlora.simulate.apart`.

Writes one JSON object to stdout: the simulation, or ``{"error": {"kind", "message"}}`` for an error of ours. Whatever
libraries print goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys

from fsdp_qlora.distributed.parent import die_with_parent

if __name__ == "__main__":  # before torch, whose import takes seconds
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process at once; the parent reports it

import json
from dataclasses import asdict
from typing import Any

from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.simulate.step import simulate_here


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the simulation of ``{"config", "world_size"}``, or the error that it raises."""
    try:
        return asdict(simulate_here(from_dict(asked["config"]), asked["world_size"]))
    except FsdpQloraError as error:
        return {"error": {"kind": type(error).__name__, "message": str(error)}}


def main() -> int:
    """Answer one question."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        out.write(json.dumps(answer(json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
