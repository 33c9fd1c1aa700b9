"""How a run's rows become micro-batches: padded, packed, or one flat row."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Self

from fsdp_qlora.attention.blocks import KEPT_SCORES_LENGTH
from fsdp_qlora.attention.blockwise import BLOCKWISE
from fsdp_qlora.attention.flatten import reads_boundaries
from fsdp_qlora.attention.varlen import VARLEN
from fsdp_qlora.config.schema import DataSettings, TrainSettings
from fsdp_qlora.data.forms import Form, width_step
from fsdp_qlora.data.loader import Piece, Rows, TokenBatch, TokenRows
from fsdp_qlora.data.pack import FlatRows, PackedRows, flat_batch, pack

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How rows become micro-batches: padded, packed, or flat."""

    data: DataSettings
    attention: str
    """The attention implementation; one that `reads_boundaries` takes flat micro-batches."""
    num_sequences: int
    """Sequences per micro-batch."""
    step: int
    """Packed and flat micro-batches are padded to a multiple of this many tokens."""
    is_main: bool

    @classmethod
    def of(
        cls,
        data: DataSettings,
        train: TrainSettings,
        attention: str,
        compiled: bool = False,
        is_main: bool = False,
    ) -> Self:
        """Return the layout for the settings and the model's attention implementation.

        Args:
            data: how rows are packed, and their maximum length.
            train: the size of a micro-batch.
            attention: the attention implementation, not ``auto``.
            compiled: whether the decoder layers are compiled; micro-batches then come in few widths.
            is_main: whether to log how well sequences are filled.
        """
        by_tokens = max(2, train.micro_batch_tokens // data.max_length)
        num_sequences = by_tokens if train.micro_batch_tokens else train.micro_batch_size
        return cls(data, attention, num_sequences, width_step(data.max_length) if compiled else 1, is_main)

    @property
    def varlen(self) -> bool:
        """Whether the attention implementation reads boundaries."""
        return reads_boundaries(self.attention)

    @property
    def flat(self) -> bool:
        """Whether a micro-batch is one flat row."""
        return self.varlen or self.data.padding_free

    @property
    def shared_rows(self) -> list[int] | None:
        """Number of rows in each sequence of the probe's micro-batch; None if rows never share a sequence."""
        if self.data.packing:
            return [2] * self.num_sequences
        if self.data.padding_free:
            return [max(2, self.num_sequences)]
        return [1] * self.num_sequences if self.varlen and self.num_sequences > 1 else None

    def __call__(self, rows: TokenRows) -> Rows:
        """Lay out rows as micro-batches."""
        laid: Rows = _packed(rows, self.data.max_length, self.step, self.is_main) if self.data.packing else rows
        return FlatRows(laid, self.data.max_length, self.step, self.varlen) if self.flat else laid

    def micro_batch(self, sequences: list[list[Piece]]) -> TokenBatch:
        """Lay out the given sequences of rows as the data's are."""
        if self.flat:
            return flat_batch(sequences, self.data.max_length, self.step, self.varlen)
        laid = pack(sequences)
        return laid if self.data.packing else replace(laid, position_ids=None)

    def turning_points(self, text_config: Any) -> list[int]:
        """Return the lengths at which attention takes another code path, in ascending order."""
        window = getattr(text_config, "sliding_window", None)
        points = {window} if window and self.attention != VARLEN else set()
        points |= {KEPT_SCORES_LENGTH} if self.attention == BLOCKWISE else set()
        widest = self.data.max_length * (self.num_sequences if self.flat else 1)
        return sorted(point for point in points if point < widest)

    def expected_forms(self, num_turning_points: int, limit: int) -> frozenset[Form]:
        """Return the forms to compile when no batch is known yet, longest first."""
        restarts = self.flat and not self.varlen
        bands = [0] if restarts else range(num_turning_points, -1, -1)
        return frozenset([Form(self.flat or self.num_sequences == 1, restarts, band) for band in bands][:limit])


def _packed(rows: TokenRows, capacity: int, step: int, is_main: bool) -> PackedRows:
    packed = PackedRows(rows, capacity, step)
    if is_main:
        filled = 100 * packed.efficiency
        _log.info(
            "packing: %d rows in %d sequences of %d tokens, %.1f %% filled", len(rows), len(packed), capacity, filled
        )
    return packed
