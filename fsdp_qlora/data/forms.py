"""The properties of a micro-batch that compiled layers specialise on, and which of these forms a run compiles.

torch recompiles for a batch of one row, for attention with a mask after one without, and for lengths at which attention
takes a different path (a sliding window, scores that are kept). The forms in a run are known before it starts: layers
are compiled for the most common ones and run eagerly for the rest. The choice depends only on settings and data, so all
ranks, and a resumed run, make the same one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fsdp_qlora.data.loader import Batch, MicroBatch, TokenBatch

_MOST_PADDING = 20
"""Rounding up a width adds at most this fraction (one in so many) of ``data.max_length``."""


@dataclass(frozen=True, order=True)
class Form:
    """What compiled layers are specialised on."""

    alone: bool
    """Whether it is a single row: torch treats a size of 1 as a constant."""
    restarts: bool
    """Whether positions restart within a row, in which case attention has a mask."""
    band: int
    """Number of turning points (see `form_of`) that the width exceeds; 0 if positions restart."""


def form_of(micro_batch: TokenBatch, turning_points: Sequence[int]) -> Form:
    """Return the form of ``micro_batch``.

    Args:
        micro_batch: on the host.
        turning_points: ascending lengths; attention takes a different path for widths beyond each.
    """
    rows, width = micro_batch.input_ids.shape
    positions = micro_batch.position_ids
    restarts = (
        micro_batch.sequences is None and positions is not None and bool((positions[:, 1:] <= positions[:, :-1]).any())
    )
    return Form(rows == 1, restarts, 0 if restarts else bisect_left(turning_points, width))


def usual_forms(micro_batches: Iterable[MicroBatch], turning_points: Sequence[int], limit: int) -> frozenset[Form]:
    """Return the forms, at most ``limit``, that cover the most tokens of ``micro_batches``."""
    tokens: Counter[Form] = Counter()
    for micro_batch in micro_batches:
        assert isinstance(micro_batch, TokenBatch)
        tokens[form_of(micro_batch, turning_points)] += micro_batch.input_ids.numel()
    ordered = sorted(tokens, key=lambda form: (-tokens[form], form))
    return frozenset(ordered[:limit])


def mark_rare(
    batch_at: Callable[[int], Batch], usual: frozenset[Form], turning_points: Sequence[int]
) -> Callable[[int], Batch]:
    """Wrap ``batch_at`` to mark micro-batches whose form is not ``usual`` as rare."""

    def marked(position: int) -> Batch:
        batch = batch_at(position)
        return replace(batch, micro_batches=[told(part) for part in batch.micro_batches])

    def told(part: MicroBatch) -> TokenBatch:
        assert isinstance(part, TokenBatch)
        return replace(part, rare=part.rare or form_of(part, turning_points) not in usual)

    return marked


def width_step(max_length: int) -> int:
    """Return the step that widths are rounded up to a multiple of: a power of two from 1 to 64.

    Kernels prefer masks whose rows are a multiple of 16, and allocators prefer few sizes; rounding adds half a step on
    average.
    """
    step = 1
    while step < 64 and 2 * step * _MOST_PADDING <= max_length:
        step *= 2
    return step


def rounded(width: int, max_length: int, step: int) -> int:
    """Round ``width`` up to a multiple of ``step``, but not beyond ``max_length``."""
    return max(width, min(-(-width // step) * step, max_length))


def repeat_last(boundaries: torch.Tensor) -> torch.Tensor:
    """Pad ``boundaries`` with its last value to a length of a power of two plus one, so that few sizes occur.

    The padding adds empty sequences.
    """
    size = 2
    while size + 1 < len(boundaries):
        size *= 2
    return torch.cat([boundaries, boundaries[-1:].expand(size + 1 - len(boundaries))])
