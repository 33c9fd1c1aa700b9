"""What of a micro-batch compiled layers cannot take as a symbol, and the few forms that a run compiles.

torch compiles anew for a batch of one row, for attention with a mask where there was none, and for lengths at which
attention takes another way (a sliding window, scores that are kept). Which forms a run meets is known before it starts:
the usual ones are compiled, the rest runs the layers as they are written. It follows from settings and data alone, so
all ranks, and a resumed run, decide alike.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fsdp_qlora.data.loader import Batch, MicroBatch

_MOST_PADDING = 20
"""At most one in so many tokens of ``data.max_length`` is added to come to a width."""


@dataclass(frozen=True, order=True)
class Form:
    """What compiled layers are specialised to."""

    alone: bool
    """Whether it is one row: torch takes a size of 1 for a constant."""
    restarts: bool
    """Whether positions restart within a row: attention then has a mask."""
    band: int
    """How many of the lengths at which attention changes its way it exceeds; 0 where positions restart."""


def form_of(micro_batch: MicroBatch, turning_points: Sequence[int]) -> Form:
    """Return the form of ``micro_batch``.

    Args:
        micro_batch: on the host.
        turning_points: ascending lengths up to which attention goes one way, and beyond which another.
    """
    rows, width = micro_batch.input_ids.shape
    positions = micro_batch.position_ids
    restarts = (
        micro_batch.sequences is None and positions is not None and bool((positions[:, 1:] <= positions[:, :-1]).any())
    )
    return Form(rows == 1, restarts, 0 if restarts else bisect_left(turning_points, width))


def usual_forms(micro_batches: Iterable[MicroBatch], turning_points: Sequence[int], limit: int) -> frozenset[Form]:
    """Return the at most ``limit`` forms that most tokens of ``micro_batches`` come in."""
    tokens: Counter[Form] = Counter()
    for micro_batch in micro_batches:
        tokens[form_of(micro_batch, turning_points)] += micro_batch.input_ids.numel()
    ordered = sorted(tokens, key=lambda form: (-tokens[form], form))
    return frozenset(ordered[:limit])


def mark_rare(
    batch_at: Callable[[int], Batch], usual: frozenset[Form], turning_points: Sequence[int]
) -> Callable[[int], Batch]:
    """Return ``batch_at`` with micro-batches of other forms than the ``usual`` ones marked."""

    def marked(position: int) -> Batch:
        batch = batch_at(position)
        parts = [replace(m, rare=m.rare or form_of(m, turning_points) not in usual) for m in batch.micro_batches]
        return replace(batch, micro_batches=parts)

    return marked


def width_step(max_length: int) -> int:
    """Return what widths are rounded up to a multiple of: a power of two from 1 to 64.

    Kernels like a mask whose rows are a multiple of 16, and allocators few sizes; half a step is added on average.
    """
    step = 1
    while step < 64 and 2 * step * _MOST_PADDING <= max_length:
        step *= 2
    return step


def rounded(width: int, max_length: int, step: int) -> int:
    """Return ``width`` rounded up to a multiple of ``step``, but not beyond ``max_length`` for that."""
    return max(width, min(-(-width // step) * step, max_length))


def repeat_last(boundaries: torch.Tensor) -> torch.Tensor:
    """Return ``boundaries`` with the last one repeated, up to one more than a power of two: so they have few sizes.

    What is added are sequences of no tokens.
    """
    size = 2
    while size + 1 < len(boundaries):
        size *= 2
    return torch.cat([boundaries, boundaries[-1:].expand(size + 1 - len(boundaries))])
