"""Checks by digest, before the first step, that each rank gathers what the ranks have loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_qlora.checks.copies import first_difference
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.distributed.shards import local_tensor, row_range
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.matrices import STATISTICS, QuantMatrices
from fsdp_qlora.quant.packing import tensor_sha256


def verify_gather(model: nn.Module, ranks: Ranks) -> int:
    """Check byte for byte on every rank that FSDP gathers what was loaded, for one quantized unit of each kind.

    Where every rank keeps the parameters whole, check that all have the same, for one quantized module of each kind.

    Returns:
        The number of gathered bytes that were compared; 0 if nothing is gathered.

    Raises:
        NumericsError: naming the first parameter and rank whose bytes differ.
    """
    units = [m for m in model.modules() if m is not model and isinstance(m, FSDPModule) and _quantized_inside(m)]
    compared = sum(_verify_unit(unit, ranks) for unit in {_kind(unit): unit for unit in reversed(units)}.values())
    whole = {n: m for n, m in _quantized_inside(model).items() if not isinstance(m.packed, DTensor)}
    if whole and ranks.size > 1:
        _verify_copies({_shape(module): (name, module) for name, module in reversed(whole.items())}, ranks)
    return compared


def _kind(unit: nn.Module) -> tuple[object, ...]:
    """Return what units have in common that are gathered alike: the class, and the names and shapes of the modules."""
    return type(unit), *((name, _shape(module)) for name, module in _quantized_inside(unit).items())


def _shape(module: QuantMatrices) -> tuple[object, ...]:
    return type(module), module.packed.shape, module.quant_format


def _verify_copies(modules: Mapping[object, tuple[str, QuantMatrices]], ranks: Ranks) -> None:
    if (odd := first_difference({name: _digests(module) for name, module in modules.values()}, ranks)) is not None:
        name, rank = odd
        raise NumericsError(f"{name}: rank {rank} keeps different bytes than rank 0.")


def _verify_unit(unit: FSDPModule, ranks: Ranks) -> int:
    """Check one unit; return the number of its gathered bytes."""
    assert isinstance(unit, nn.Module)
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
        return sum(getattr(m, name).nbytes for m in modules.values() for name in _stored_in(m))
    finally:
        unit.reshard()


def verify_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Check that every rank holds the same buffers, bit for bit; dense copies are made from bytes that are compared.

    Raises:
        NumericsError: naming the first buffer that differs, and the rank.
    """
    dense = {id(module.dense) for module in model.modules() if isinstance(module, QuantMatrices)}
    buffers = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in dense and buffer.numel()}
    mine = {name: tensor_sha256(buffer) for name, buffer in buffers.items()}
    if (odd := first_difference(mine, ranks)) is not None:
        name, rank = odd
        raise NumericsError(f"{name}: this buffer differs between rank {rank} and rank 0.")


def _quantized_inside(unit: nn.Module) -> dict[str, QuantMatrices]:
    return {name: m for name, m in unit.named_modules() if isinstance(m, QuantMatrices)}


def _stored_in(module: QuantMatrices) -> list[str]:
    """Return the names of the parameters that the module has."""
    return [name for name in ("packed", *STATISTICS) if getattr(module, name) is not None]


def _digests(module: QuantMatrices, num_shards: int = 0) -> dict[str, list[str]]:
    """Return sha256 digests by parameter name: of the local shard, or of each rank's rows of a gathered parameter."""
    found: dict[str, list[str]] = {}
    for name in _stored_in(module):
        parameter = getattr(module, name)
        if num_shards == 0:
            pieces = [local_tensor(parameter)]
        else:
            pieces = [parameter[slice(*row_range(parameter.shape[0], i, num_shards))] for i in range(num_shards)]
        found[name] = [tensor_sha256(piece) for piece in pieces]
    return found
