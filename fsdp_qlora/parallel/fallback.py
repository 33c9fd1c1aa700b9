"""What happens if layers cannot be compiled: all ranks continue uncompiled, and report it."""

from __future__ import annotations

from collections.abc import Callable

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.parallel.compile import CompiledLayers


class EagerFallback:
    """Lets the ranks agree on whether layers still run compiled (`fsdp_qlora.train.step.Fallback`).

    If only some ranks ran compiled, results would differ only by rounding, but the slowest rank would set the pace.
    """

    def __init__(
        self, layers: CompiledLayers, ranks: Ranks, asked: bool, say: Callable[[int, str], None], first_step: int = 1
    ) -> None:
        """Watch ``layers``.

        Args:
            layers: the model's compiled layers.
            ranks: the ranks that must agree.
            asked: whether ``train.compile=true`` was set explicitly: then a failure in the first step is an error.
            say: called with the step and the reason of a failure, on every rank.
            first_step: number of the first step of this start.
        """
        self._layers, self._ranks, self._asked, self._say = layers, ranks, asked, say
        self._first_step, self._agreed = first_step, False

    @property
    def failed(self) -> bool:
        """Whether compiling has failed on this rank and the ranks have not agreed on it yet."""
        return self._layers.failure is not None and not self._agreed

    def agree(self, step: int) -> None:
        """Take a failure on any rank as one of all. A collective.

        Raises:
            ConfigError: identically on every rank, if compiling was requested and fails in the first step of a start.
        """
        reasons = gather_json(self._layers.failure, self._ranks)
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        reason = reasons[rank] if all(reasons) else f"rank {rank}: {reasons[rank]}"
        self._agreed, self._layers.failure = True, reason
        if self._asked and step == self._first_step:
            error = ConfigError(
                f"train.compile: the layers of this model cannot be compiled ({reason}). Set train.compile=false, or "
                "auto, which continues without."
            )
            error.alike = True
            raise error
        self._say(step, reason)
