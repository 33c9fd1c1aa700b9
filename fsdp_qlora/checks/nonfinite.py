"""Locates the first non-finite value, by a second pass that inspects every module's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.distributed.shards import local_tensor


class BadMicroBatch(Protocol):
    """A micro-batch and the rows in it."""

    @property
    def rows(self) -> Sequence[int]:
        """Indices of its rows in the prepared data."""
        ...

    @property
    def weight(self) -> float:
        """Weight in the loss; 0 if the micro-batch only keeps this rank in step with the others."""
        ...


@contextmanager
def watching_outputs(model: nn.Module, tell: Callable[[str], None]) -> Iterator[None]:
    """Call ``tell(module name)`` for each module whose output contains a non-finite value, innermost first."""
    handles = []
    for name, module in model.named_modules():

        def look(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if not all(bool(torch.isfinite(t).all()) for t in _floats(output)):
                tell(name)

        handles.append(module.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def locate_nonfinite(
    model: nn.Module, ranks: Ranks, micro_batches: Sequence[BadMicroBatch], run: Callable[[Any], None]
) -> str:
    """Rerun the micro-batches of a bad step and describe where the first bad value appears. Every rank calls it.

    Args:
        model: the FSDP root, with the gradients of the bad step.
        ranks: its ranks.
        micro_batches: the micro-batches that this rank ran.
        run: runs the forward of one micro-batch, as the step did.
    """
    own: dict[str, Any] = {"gradient": nonfinite_gradient(model), "module": None}
    own["rows"] = [row for m in micro_batches if m.weight for row in m.rows]
    for micro_batch in micro_batches:
        modules: list[str] = []
        with torch.no_grad(), watching_outputs(model, modules.append):
            run(micro_batch)
        if modules and micro_batch.weight and own["module"] is None:
            own |= {"module": modules[0], "rows": list(micro_batch.rows)}
    told = list(enumerate(gather_json(own, ranks)))
    places = [
        f"On rank {rank}, {bad['module']} is the first module whose output is not finite, for training row(s) "
        f"{_listed(bad['rows'])}."
        for rank, bad in told
        if bad["module"]
    ]
    if not places:
        rows = "; ".join(f"rank {rank}: {_listed(bad['rows'])}" for rank, bad in told)
        bad_gradients = [f"rank {rank}'s gradient of {bad['gradient']} is not" for rank, bad in told if bad["gradient"]]
        places = [
            f"The forward is finite{''.join(', but ' + g for g in bad_gradients[:1])}. Training rows by rank: {rows}."
        ]
    return " ".join([*places, "Inspect these rows, lower optim.lr, or find the operation with debug=anomaly."])


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")


def _floats(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floats(item)


def nonfinite_gradient(model: nn.Module) -> str | None:
    """Return the last parameter in forward order (first in backward) with a non-finite gradient on this rank."""
    bad = [
        name
        for name, p in trainable_parameters(model)
        if p.grad is not None and not bool(torch.isfinite(local_tensor(p.grad)).all())  # type: ignore[arg-type]
    ]
    return bad[-1] if bad else None
