"""8-bit states (https://arxiv.org/abs/2110.02861) on shards, and how another number of ranks reads their blocks.

bitsandbytes quantizes a flattened state in blocks of 256 elements that share one float32 absmax. Every rank flattens
its own rows, so blocks start anew at each shard. A checkpoint holds the codes, sharded like the parameter, and the
absmax as a table with one row per rank that shares the parameter: its blocks, padded with zeros. The shapes of the
parameter and the table determine each element's absmax, so any other number of ranks can read its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from bitsandbytes import functional

from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.optim.sizes import BLOCK_SIZE, num_blocks


def borders_coincide(shape: Sequence[int], num_ranks: int) -> bool:
    """Whether each rank's blocks are blocks of the whole tensor, so that no bit depends on the number of ranks."""
    starts = (row_range(shape[0], rank, num_ranks)[0] for rank in range(num_ranks))
    return all(start * prod(shape[1:]) % BLOCK_SIZE == 0 for start in starts if start < shape[0])


def table_shape(shape: Sequence[int], num_ranks: int) -> tuple[int, int]:
    """Return the shape of the absmax table: number of ranks, and most blocks on any rank."""
    return num_ranks, num_blocks(row_range(shape[0], 0, num_ranks)[1] * prod(shape[1:]))


def absmax_of_elements(table: torch.Tensor, shape: Sequence[int], rows: tuple[int, int]) -> torch.Tensor:
    """Return the absmax of each element in these rows of a parameter, float32 ``[elements]``.

    ``table`` may come from any number of ranks.
    """
    in_a_row = prod(shape[1:])
    in_a_shard = row_range(shape[0], 0, table.shape[0])[1] * in_a_row
    elements = torch.arange(rows[0] * in_a_row, rows[1] * in_a_row, device=table.device)
    return table[elements // in_a_shard, elements % in_a_shard // BLOCK_SIZE]


def quantize_state(values: torch.Tensor, table_of_codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (uint8, as ``values``) and absmax (float32 ``[blocks]``), as in bitsandbytes' optimizers."""
    codes, state = functional.quantize_blockwise(values, code=table_of_codes, blocksize=BLOCK_SIZE)
    return codes, state.absmax


def fit_blocks(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table_of_codes: torch.Tensor,
    table: torch.Tensor,
    shape: Sequence[int],
    rank: int,
    num_ranks: int,
) -> None:
    """Convert this rank's rows, as saved by another number of ranks, to its own blocks.

    If the block borders of both coincide with those of the whole tensor, no code changes. Otherwise the values are
    quantized again.

    Args:
        codes: uint8, this rank's rows; changed in place.
        absmax: float32 ``[blocks]`` of this rank; filled in place.
        table_of_codes: float32 ``[256]``, the value of each code.
        table: the saved absmax, float32 ``[ranks, blocks]``.
        shape: shape of the whole parameter.
        rank: this rank's index among those that share the parameter.
        num_ranks: number of ranks that share it now.
    """
    rows = row_range(shape[0], rank, num_ranks)
    if rows[0] == rows[1]:
        return
    of_elements = absmax_of_elements(table, shape, rows).to(codes.device)
    if borders_coincide(shape, table.shape[0]) and borders_coincide(shape, num_ranks):
        absmax.copy_(of_elements[::BLOCK_SIZE])
        return
    values = table_of_codes.to(codes.device)[codes.flatten().long()] * of_elements
    new_codes, new_absmax = quantize_state(values, table_of_codes.to(codes.device))
    codes.copy_(new_codes.view_as(codes))
    absmax.copy_(new_absmax)
