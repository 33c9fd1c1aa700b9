"""Checks by digest that replicated adapters are equal on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

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
    if (odd := first_difference(digests, ranks)) is not None:
        name, rank = odd
        raise NumericsError(
            f"{name}: rank {rank} has different values from rank 0; replicated adapters must be identical on all ranks."
        )


def first_difference(mine: Mapping[str, Any], ranks: Ranks) -> tuple[str, int] | None:
    """Return the first name under which a rank has another value than rank 0, and that rank. Every rank calls it."""
    first, *others = gather_json(mine, ranks)
    return next(((n, r) for r, other in enumerate(others, start=1) for n in first if other.get(n) != first[n]), None)
