"""Checks by digest that replicated adapters are equal on every rank."""

from __future__ import annotations

import hashlib

from torch.distributed.tensor import DTensor

from fsdp_qlora.adapters.replicated import Named
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.packing import tensor_sha256


def require_equal_copies(parameters: Named, ranks: Ranks) -> None:
    """Check that unsharded parameters hold the same bytes on every rank. Every rank calls it.

    Raises:
        NumericsError: identically on every rank, naming the first parameter and rank that differ.
    """
    digests = {name: tensor_sha256(p) for name, p in parameters if not isinstance(p, DTensor)}
    everywhere = gather_json(hashlib.sha256("".join(digests.values()).encode()).hexdigest(), ranks)
    if len(set(everywhere)) == 1:
        return
    first, *others = gather_json(digests, ranks)
    rank, name = next((r, n) for r, other in enumerate(others, start=1) for n in digests if other[n] != first[n])
    raise NumericsError(
        f"{name}: rank {rank} has different values from rank 0; replicated adapters must be identical on all ranks."
    )
