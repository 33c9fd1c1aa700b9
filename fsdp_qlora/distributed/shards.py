"""Which rows of a tensor a rank holds, and how to fill them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def row_range(rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return ``(start, stop)`` of the rows held by ``rank``: dim-0 sharding as in `torch.chunk` and FSDP2."""
    chunk = -(-rows // num_ranks)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def fullest_share(rows: int, num_ranks: int) -> int:
    """Return the number of rows of the rank that holds most."""
    return row_range(rows, 0, num_ranks)[1]


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor, or the tensor itself (to write into it, call under ``torch.no_grad``)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[attr-defined]


def fill_slice(parameter: torch.Tensor, whole: torch.Tensor, shard_rank: int, shard_size: int) -> None:
    """Copy this rank's dim-0 rows of ``whole`` into ``parameter``, or all rows if it is not sharded.

    Call it under ``torch.no_grad``.
    """
    start, stop = row_range(whole.shape[0], shard_rank, shard_size)
    local_tensor(parameter).copy_(whole[start:stop] if isinstance(parameter, DTensor) else whole)


HOST = torch.device("cpu")
