"""8-bit states (https://arxiv.org/abs/2110.02861) on shards: which block an element is in, on any number of ranks.

bitsandbytes quantizes a flattened state in blocks of 256 elements that share one float32 absmax. Every rank flattens
its own rows, so blocks begin anew at each shard. A checkpoint holds the codes sharded as the parameter is, and the
absmax as a table with a row for each rank that shares the parameter: its blocks, zeros after them. The shapes of
parameter and table say which absmax an element had, so any other number of ranks can read its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from bitsandbytes import functional

from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.optim.sizes import BLOCK_SIZE, num_blocks


def borders_coincide(shape: Sequence[int], num_ranks: int) -> bool:
    """Return whether each rank's blocks are blocks of the whole: then no bit depends on the number of ranks."""
    starts = (row_range(shape[0], rank, num_ranks)[0] for rank in range(num_ranks))
    return all(start * prod(shape[1:]) % BLOCK_SIZE == 0 for start in starts if start < shape[0])


def table_shape(shape: Sequence[int], num_ranks: int) -> tuple[int, int]:
    """Return the shape of the table of absmax: ranks, and blocks of the fullest."""
    return num_ranks, num_blocks(row_range(shape[0], 0, num_ranks)[1] * prod(shape[1:]))


def absmax_of_elements(table: torch.Tensor, shape: Sequence[int], rows: tuple[int, int]) -> torch.Tensor:
    """Return the absmax of each element in these rows of a parameter, float32 ``[elements]``, from anyone's table."""
    in_a_row = prod(shape[1:])
    in_a_shard = row_range(shape[0], 0, table.shape[0])[1] * in_a_row
    elements = torch.arange(rows[0] * in_a_row, rows[1] * in_a_row, device=table.device)
    return table[elements // in_a_shard, elements % in_a_shard // BLOCK_SIZE]


def quantize_state(values: torch.Tensor, table_of_codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (uint8, as ``values``) and absmax (float32 ``[blocks]``) as bitsandbytes' optimizers do."""
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
    """Turn this rank's rows as another number of ranks saved them into its own blocks.

    Where the borders of both coincide with the whole's, no code changes. Elsewhere the values are quantized anew.

    Args:
        codes: uint8, this rank's rows; changed in place.
        absmax: float32 ``[blocks]``, this rank's; filled.
        table_of_codes: float32 ``[256]``: what each code stands for.
        table: the saved absmax, float32 ``[ranks, blocks]``.
        shape: the parameter's, over all ranks.
        rank: this rank's number among those that share the parameter.
        num_ranks: how many these are now.
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
