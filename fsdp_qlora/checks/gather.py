"""Checks by digest, before the first step, that each rank gathers what the ranks have loaded."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.distributed.shards import local_tensor, row_range
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.matrices import STATISTICS, QuantMatrices
from fsdp_qlora.quant.packing import tensor_sha256


def verify_gather(model: nn.Module, ranks: Ranks) -> None:
    """Check byte for byte on every rank that FSDP gathers what was loaded, for the first quantized unit.

    Raises:
        NumericsError: naming the first parameter and rank whose bytes differ.
    """
    units = [m for m in model.modules() if m is not model and isinstance(m, FSDPModule) and _quantized_inside(m)]
    if not units:  # nothing is quantized
        return
    unit = units[0]
    modules = _quantized_inside(unit)
    loaded = gather_json({n: _digests(m) for n, m in modules.items()}, ranks)
    unit.unshard()
    try:
        for name, module in modules.items():
            gathered = _digests(module, ranks.shard_size)
            for part, digests in gathered.items():
                for shard, digest in enumerate(digests):
                    for owner in range(shard, ranks.size, ranks.shard_size):
                        if loaded[owner][name][part][0] != digest:
                            raise NumericsError(
                                f"{name}.{part}: rank {ranks.rank} gathers different bytes from those rank {owner} "
                                "loaded."
                            )
    finally:
        unit.reshard()


def verify_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Check that every rank holds the same buffers, bit for bit.

    Raises:
        NumericsError: naming the first buffer that differs, and the rank.
    """
    mine = {name: tensor_sha256(buffer) for name, buffer in model.named_buffers() if buffer.numel()}
    first, *others = gather_json(mine, ranks)
    for rank, digests in enumerate(others, start=1):
        for name in (n for n in first if digests.get(n) != first[n]):
            raise NumericsError(f"{name}: this buffer differs between rank {rank} and rank 0.")


def _quantized_inside(unit: nn.Module) -> dict[str, QuantMatrices]:
    return {name: m for name, m in unit.named_modules() if isinstance(m, QuantMatrices)}


def _digests(module: QuantMatrices, num_shards: int = 0) -> dict[str, list[str]]:
    """Return sha256 digests by parameter name: of the local shard, or of each rank's rows of a gathered parameter."""
    found: dict[str, list[str]] = {}
    for name in ("packed", *STATISTICS):
        parameter = getattr(module, name)
        if parameter is None:
            continue
        if num_shards == 0:
            pieces = [local_tensor(parameter)]
        else:
            pieces = [parameter[slice(*row_range(parameter.shape[0], i, num_shards))] for i in range(num_shards)]
        found[name] = [tensor_sha256(piece) for piece in pieces]
    return found
