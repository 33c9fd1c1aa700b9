"""What happens where layers cannot be compiled: all ranks go on with the layers as written, and say so."""

from __future__ import annotations

from collections.abc import Callable

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import any_rank, gather_json
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.parallel.compile import CompiledLayers


class EagerFallback:
    """Called with each step's number after its backward: ranks agree whether layers still run compiled.

    Ranks that compile and ranks that do not would train the same, but for rounding and speed: the slowest would decide.
    """

    def __init__(self, layers: CompiledLayers, ranks: Ranks, asked: bool, say: Callable[[int, str], None]) -> None:
        """Watch ``layers``.

        Args:
            layers: the model's.
            ranks: those that agree.
            asked: whether ``train.compile=true`` was asked for by name: then the first step must not fail.
            say: takes the step and the reason of a failure, on every rank.
        """
        self._layers, self._ranks, self._asked, self._say = layers, ranks, asked, say
        self._steps, self._agreed = 0, False

    def __call__(self, step: int) -> None:
        """Compare notes. A collective.

        Raises:
            ConfigError: identically on every rank, if compiling was asked for and fails in the first step of a start.
        """
        self._steps += 1
        if self._agreed or not any_rank(self._layers.failure is not None, self._ranks):
            return
        reasons = gather_json(self._layers.failure, self._ranks)
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        reason = reasons[rank] if all(reasons) else f"rank {rank}: {reasons[rank]}"
        self._agreed, self._layers.failure = True, reason
        if self._asked and self._steps == 1:
            error = ConfigError(
                f"train.compile: the layers of this model cannot be compiled ({reason}). Set train.compile=false, or "
                "auto, which goes on without."
            )
            error.alike = True
            raise error
        self._say(step, reason)
