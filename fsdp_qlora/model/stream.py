"""Read my slice -> quantize -> fill my shard: how a sharded meta model becomes real.

No rank reads, holds or quantizes more than its own rows of a weight (and one exchange of the small statistics, because
double quantization subtracts the mean over the *whole* tensor).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.dist.reduce import all_gather, gather_json, on_every
from fsdp_qlora.errors import ModelError, NumericsError
from fsdp_qlora.model.skeleton import restore_buffers
from fsdp_qlora.model.weights import SafetensorsFolder, TensorEntry
from fsdp_qlora.plan.layout import ROW_WEIGHTS, num_blocks, row_range
from fsdp_qlora.quant.formats import one_thread, to_rows
from fsdp_qlora.quant.linear import STATISTICS, QuantLinear, local_tensor
from fsdp_qlora.quant.packing import num_rows, raw_bytes

_PIECE = 64 * ROW_WEIGHTS
"""Elements read at a time: whole rows, so that no slice exists as floats at once."""
Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


@dataclass(frozen=True)
class LoadReport:
    """What loading took on this rank."""

    bytes_read: int
    """Bytes read from the model's files, headers included."""
    file_bytes: int
    """Size of those files."""
    quantized_bytes: int
    """Resident bytes of this rank's packed weights and statistics."""
    seconds: float


def stream_weights(
    model: nn.Module,
    base: PreTrainedModel,
    source: SafetensorsFolder,
    ranks: Ranks,
    progress: Progress | None = None,
) -> LoadReport:
    """Materialise ``model`` (sharded, on meta) and fill the base's parameters from ``source``.

    ``base`` is the transformers model inside ``model``. Adapters are left for `initialize_adapters`.

    Raises:
        FsdpQloraError: on every rank alike, if on any a tensor is missing, has the wrong shape, or holds a value that
            is not a finite number (code 2), or a file cannot be read (code 74).
        NumericsError: if a planned linear was not filled or the tie of head and embedding was lost.
    """
    started = time.perf_counter()
    tied = base.get_input_embeddings().weight is _head_weight(base)
    model.to_empty(device=ranks.device)
    restore_buffers(base, ranks.device)
    quantized = [(n.removesuffix(".base_layer"), m) for n, m in base.named_modules() if isinstance(m, QuantLinear)]
    kept = [(_file_name(n), p) for n, p in base.named_parameters() if not _is_ours(n, p, base)]
    wanted = [(f"{n}.weight", m.shape) for n, m in quantized] + [(name, tuple(p.shape)) for name, p in kept]
    found = on_every(lambda: [source.find(name, shape) for name, shape in wanted], ranks)
    entries, kept_entries = found[: len(quantized)], found[len(quantized) :]
    total = len(entries) + len(kept)
    with one_thread(), torch.no_grad():
        for done, ((_, module), entry) in enumerate(zip(quantized, entries, strict=True)):
            _fill_quantized(module, entry, source, ranks)
            if progress:
                progress(done + 1, total)
        for done, ((_, parameter), entry) in enumerate(zip(kept, kept_entries, strict=True)):
            _fill_kept(parameter, entry, source, ranks)
            if progress:
                progress(len(entries) + done + 1, total)
    if tied and base.get_input_embeddings().weight is not _head_weight(base):
        raise NumericsError("head and embedding share one weight in this model, but no longer after loading.")
    size = sum(resident_bytes(module) for _, module in quantized)
    return LoadReport(source.bytes_read, source.total_bytes, size, time.perf_counter() - started)


def _head_weight(base: PreTrainedModel) -> torch.Tensor | None:
    return getattr(base.get_output_embeddings(), "weight", None)


def _file_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _is_ours(name: str, parameter: nn.Parameter, base: PreTrainedModel) -> bool:
    """Whether a parameter is an adapter, or packed bytes or statistics: not in the model's files under that name."""
    owner, _, child = name.rpartition(".")
    return parameter.requires_grad or (
        child in ("packed", *STATISTICS) and isinstance(base.get_submodule(owner), QuantLinear)
    )


def _fill_quantized(module: QuantLinear, entry: TensorEntry, source: SafetensorsFolder, ranks: Ranks) -> None:
    def read(start: int, stop: int) -> torch.Tensor:
        weights = source.read(entry, start, stop)
        _require_finite(weights, entry)
        return weights

    stream_linear(module, read, ranks)


@torch.no_grad()
def stream_linear(module: QuantLinear, read: Callable[[int, int], torch.Tensor], ranks: Ranks) -> None:
    """Quantize this rank's rows of one weight and write them into ``module``. Every rank calls it.

    Args:
        module: a layer that is real; sharded (then each rank fills its own rows) or not.
        read: called with ``(start, stop)``; returns those elements of the flattened weight, in their own dtype.
        ranks: whom to exchange the statistics with.
    """
    numel = module.in_features * module.out_features
    first, last = _rows_of(module.packed, ranks)
    start, stop = min(first * ROW_WEIGHTS, numel), min(last * ROW_WEIGHTS, numel)
    quant_format = module.quant_format

    def quantize_mine() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [quant_format.quantize_blocks(read(a, b).to(ranks.device)) for a, b in _pieces(start, stop)]

    parts = on_every(quantize_mine, ranks)
    codes, absmax = (torch.cat(part) for part in zip(*parts, strict=True))
    offset = None
    if quant_format.double_quant:
        offset = _mean_over_ranks(absmax, numel, isinstance(module.packed, DTensor), ranks)
    module.fill(to_rows(quant_format, codes, absmax, offset, last - first))


def _rows_of(parameter: torch.Tensor, ranks: Ranks) -> tuple[int, int]:
    """Return the dim-0 range of ``parameter`` that this rank holds, checked against what FSDP gave it."""
    rows = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, rows
    start, stop = row_range(rows, ranks.shard_rank, ranks.shard_size)
    local = parameter.to_local().shape[0]
    if local != stop - start:
        raise NumericsError(f"FSDP gave this rank {local} rows of {rows}, the layout expects {stop - start}.")
    return start, stop


def _mean_over_ranks(absmax: torch.Tensor, numel: int, sharded: bool, ranks: Ranks) -> torch.Tensor:
    """Return the mean of the whole tensor's absmax, computed alike on every rank (sums depend on their order)."""
    if not sharded:
        return absmax.mean()
    rows_each = row_range(num_rows(numel), 0, ranks.shard_size)[1]
    padded = torch.zeros(rows_each * (ROW_WEIGHTS // 64), dtype=torch.float32, device=absmax.device)
    padded[: absmax.numel()] = absmax
    return torch.cat(all_gather(padded, ranks.shard_group))[: num_blocks(numel)].mean()


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """Cut a range of elements into such as are read at a time; an empty range is one piece."""
    return [(a, min(a + _PIECE, stop)) for a in range(start, stop, _PIECE)] or [(start, stop)]


def _fill_kept(parameter: torch.Tensor, entry: TensorEntry, source: SafetensorsFolder, ranks: Ranks) -> None:
    first, last = _rows_of(parameter, ranks)
    width = prod(entry.shape[1:])
    local = local_tensor(parameter).view(-1)

    def fill_mine() -> None:
        for a, b in _pieces(first * width, last * width):
            values = source.read(entry, a, b)
            _require_finite(values, entry)
            local[a - first * width : b - first * width] = values

    on_every(fill_mine, ranks)


def fill_slice(parameter: torch.Tensor, whole: torch.Tensor, shard_rank: int, shard_size: int) -> None:
    """Write this rank's dim-0 rows of ``whole`` into ``parameter`` (call under ``torch.no_grad``)."""
    start, stop = row_range(whole.shape[0], shard_rank, shard_size)
    local_tensor(parameter).copy_(whole[start:stop])


def _require_finite(values: torch.Tensor, entry: TensorEntry) -> None:
    # The smallest and the largest: NaN comes through both, and no tensor of booleans is made.
    if values.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
        raise ModelError(f"{entry.file}: tensor {entry.name} holds values that are not finite numbers.")


def resident_bytes(module: QuantLinear) -> int:
    """Return the bytes of packed weight and statistics that this rank holds of ``module``."""
    parts = [getattr(module, name) for name in ("packed", *STATISTICS)]
    return sum(local_tensor(p).numel() * p.element_size() for p in parts if p is not None)


def verify_gather(model: nn.Module, ranks: Ranks) -> None:
    """Check that what FSDP gathers is what was loaded, on one sampled layer, byte for byte on every rank.

    Raises:
        NumericsError: naming the first parameter and rank whose bytes changed on the way.
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
                                f"{name}.{part}: rank {ranks.rank} gathers other bytes than rank {owner} loaded."
                            )
    finally:
        unit.reshard()


def _quantized_inside(unit: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in unit.named_modules() if isinstance(m, QuantLinear)}


def _digests(module: QuantLinear, num_shards: int = 0) -> dict[str, list[str]]:
    """Return sha256 of the local shard, or of each rank's rows of a gathered parameter, by parameter name."""
    found: dict[str, list[str]] = {}
    for name in ("packed", *STATISTICS):
        parameter = getattr(module, name)
        if parameter is None:
            continue
        if num_shards == 0:
            pieces = [local_tensor(parameter)]
        else:
            pieces = [parameter[slice(*row_range(parameter.shape[0], i, num_shards))] for i in range(num_shards)]
        found[name] = [_sha256(piece) for piece in pieces]
    return found


def _sha256(tensor: torch.Tensor) -> str:
    # A copy: a tensor that has been a numpy array can no longer be resized, and FSDP frees by resizing.
    return hashlib.sha256(raw_bytes(tensor).to("cpu", copy=True).numpy().data).hexdigest()


__all__ = [
    "LoadReport",
    "fill_slice",
    "resident_bytes",
    "stream_linear",
    "stream_weights",
    "verify_gather",
]
