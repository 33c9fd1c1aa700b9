"""Fills a sharded meta model: each rank reads its own slice, quantizes it and fills its shard.

No rank reads, holds or quantizes more than its own rows of a weight, unless it is stored transposed or needs one of
upstream's conversions: then each rank reads all of it. Ranks exchange only the small statistics, because double
quantization subtracts their mean over the *whole* tensor. Where every rank keeps a whole weight, each still reads and
quantizes its own rows, and then they exchange them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_gather, on_every
from fsdp_qlora.distributed.shards import HOST, local_tensor, row_range
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.load.buffers import persistent_buffers, to_empty_but_buffers
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.safetensors import SafetensorsFolder, StoredTensor
from fsdp_qlora.load.stored import PackedWeight, fill_packed, find_kept, find_weight, read_dequantized
from fsdp_qlora.load.weights import BaseWeight, LowRank, Read, less
from fsdp_qlora.quant.formats import Format, Packed, build_format, nested_of_rows, one_thread
from fsdp_qlora.quant.matrices import STATISTICS, QuantMatrices
from fsdp_qlora.quant.packing import CHUNK_WEIGHTS, float_to_bits, values_to_rows
from fsdp_qlora.shapes.linears import LinearShape

Progress = Callable[[int, int], None]
"""Called with (tensors done, total number of tensors)."""
Lower = Callable[[Sequence[BaseWeight]], Iterator[BaseWeight]]
"""Yields weights in the same order, each with another `BaseWeight.read` where the base gets other values."""


@dataclass(frozen=True)
class LoadReport:
    """The cost of loading on this rank."""

    bytes_read: int
    """Bytes read from the model's files, headers included."""
    file_bytes: int
    """Size of those files."""
    quantized_bytes: int
    """Resident bytes of this rank's packed weights and statistics."""
    seconds: float
    stored: int = 0
    """Number of linears that the files already hold in 4 bits; their bytes were read as they are."""


def stream_weights(
    model: nn.Module,
    base: nn.Module,
    source: SafetensorsFolder,
    ranks: Ranks,
    progress: Progress | None = None,
    shards_on: torch.device | None = None,
    on_host: Iterable[nn.Module] = (),
    lower: Lower = iter,
    trained: Collection[str] = (),
) -> LoadReport:
    """Materialise ``model`` (sharded, on meta) and fill the base's parameters from ``source``.

    ``base`` is the model inside ``model``. Adapters are left to `initialize_adapters`. Shards are allocated on
    ``shards_on`` (None: the ranks' device; the CPU if `shard_model` offloads them); shards of the modules ``on_host``
    are allocated on the CPU. ``lower`` may yield the weights with other values than the files have. ``trained`` are the
    base's own parameters that are trained, by their names in the files.

    Raises:
        FsdpQloraError: identically on every rank, if on any rank a tensor is missing, has the wrong shape or holds a
            value that is not finite (code 2), or a file cannot be read (code 74).
        NumericsError: if a tied parameter is no longer one, or FSDP's shards differ from the expected layout.
    """
    started = time.perf_counter()
    tied = _first_names(base)
    allocate(model, shards_on or ranks.device, ranks.device, on_host)
    on_every(lambda: _fill_buffers(base, source), ranks)
    quantized = [m for m in base.modules() if isinstance(m, QuantMatrices)]
    kept = [(n, p) for n, p in base.named_parameters() if _file_name(n) in trained or not _is_ours(n, p, base)]
    entries = on_every(lambda: [find_weight(source, m) for m in quantized], ranks)
    kept_entries = on_every(lambda: [find_kept(source, _file_name(n), tuple(p.shape)) for n, p in kept], ranks)
    weights = [_quantized_weight(m, entry, source) for m, entry in zip(quantized, entries, strict=True)]
    weights += [_kept_weight(base, n, entry, source) for (n, _), entry in zip(kept, kept_entries, strict=True)]
    places = [*zip(quantized, entries, strict=True), *((parameter, None) for _, parameter in kept)]
    with one_thread(), torch.no_grad():
        for done, (weight, (place, entry)) in enumerate(zip(lower(weights), places, strict=True)):
            if isinstance(place, QuantMatrices):
                _fill_quantized(place, weight, entry, source, ranks)
            else:
                _fill_kept(place, weight, ranks)
            if progress:
                progress(done + 1, len(weights))
    if lost := sorted(tied.items() - _first_names(base).items()):
        raise NumericsError(f"{lost[0][1]} and {lost[0][0]} share one weight in this model, but not after loading.")
    size = sum(resident_bytes(module) for module in quantized)
    stored = sum(isinstance(entry, PackedWeight) for entry in entries)
    return LoadReport(source.bytes_read, source.total_bytes, size, time.perf_counter() - started, stored)


@torch.no_grad()
def fill_alone(
    packed: Packed, source: SafetensorsFolder, ranks: Ranks, taken: LowRank | None = None
) -> QuantMatrices:  # fmt: skip
    """Return one weight of the files as a model on one rank would hold it, quantized, on the ranks' device.

    ``taken`` is taken off it before it is quantized.

    Raises:
        FsdpQloraError: as `stream_weights`.
    """
    linear = packed.linear
    module = QuantMatrices(linear.in_features, linear.out_features, packed.quant_format, linear.count, ranks.device)
    module.stored = linear
    entry = find_weight(source, module)
    weight = _quantized_weight(module, entry, source)
    if taken is not None:
        weight = replace(weight, read=less(weight.read, taken.on(ranks.device), ranks.device), as_stored=False)
    with one_thread():
        _fill_quantized(module, weight, entry, source, ranks)
    return module


def allocate(model: nn.Module, shards_on: torch.device, device: torch.device, on_host: Iterable[nn.Module]) -> None:
    """Allocate sharded parameters on ``shards_on``, those of ``on_host`` on the host, unsharded ones on ``device``.

    FSDP moves the parameters it manages to the device, but not buffers or parameters that it does not shard.
    """
    to_empty_but_buffers(model, shards_on, device)
    if shards_on != HOST:
        for module in on_host:
            module.to_empty(device=HOST, recurse=False)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = not isinstance(parameter, DTensor) and not parameter.requires_grad
            if whole and parameter.device.type != device.type:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                setattr(module, name, moved[parameter])


def _fill_buffers(base: nn.Module, source: SafetensorsFolder) -> None:
    """Load the buffers in the files, whole on every rank; the others keep the values from upstream's constructor."""
    for name, buffer in persistent_buffers(base).items():
        stored = _file_name(name)
        if source.has(stored):
            buffer.copy_(source.read_buffer(stored, tuple(buffer.shape)))


def _first_names(base: nn.Module) -> dict[str, str]:
    """Return, for the name of each parameter, the first name that it has: a tied head has the embedding's."""
    first: dict[nn.Parameter, str] = {}
    return {name: first.setdefault(p, name) for name, p in base.named_parameters(remove_duplicate=False)}


def _file_name(name: str) -> str:
    return re.sub(r"(\.base_layer)+\.", ".", name)  # adapters on experts are nested


def _is_ours(name: str, parameter: nn.Parameter, base: nn.Module) -> bool:
    """Whether a parameter is ours and so not in the files under that name: an adapter, packed bytes or statistics."""
    owner, _, child = name.rpartition(".")
    return parameter.requires_grad or (
        child in ("packed", *STATISTICS) and isinstance(base.get_submodule(owner), QuantMatrices)
    )


def _fill_quantized(
    module: QuantMatrices, weight: BaseWeight, entry: StoredTensor | PackedWeight | None, source: SafetensorsFolder,
    ranks: Ranks,
) -> None:  # fmt: skip
    if not isinstance(entry, PackedWeight) or not weight.as_stored:
        stream_linear(module, weight.read, ranks)
        return
    rows = _rows_of(module.packed, ranks) if isinstance(module.packed, DTensor) else (0, module.packed.shape[0])
    on_every(partial(fill_packed, module, entry, source, rows, ranks.device), ranks)


def _quantized_weight(
    module: QuantMatrices, entry: StoredTensor | PackedWeight, source: SafetensorsFolder
) -> BaseWeight:  # fmt: skip
    if isinstance(entry, PackedWeight):
        read = partial(read_dequantized, module, entry, source)
    else:
        read = _reader(module, entry, source)
    packed = isinstance(entry, PackedWeight)
    return BaseWeight(module, read, module.shape, False, module.quant_format, packed)


def weight_of(source: SafetensorsFolder, linear: LinearShape, quant_format: Format | None = None) -> torch.Tensor:
    """Return a linear's weight from the files, float32 ``[out_features, in_features]`` on the CPU.

    Raises:
        ModelError: as `find_weight`; ``quant_format`` is the one that a weight stored in 4 bits must have.
    """
    module = QuantMatrices(linear.in_features, linear.out_features, quant_format or build_format())
    module.stored = linear
    return _quantized_weight(module, find_weight(source, module), source).whole(HOST)


def _kept_weight(base: nn.Module, name: str, entry: StoredTensor, source: SafetensorsFolder) -> BaseWeight:
    def read(start: int, stop: int) -> torch.Tensor:
        values = source.read(entry, start, stop)
        require_finite(values, f"{entry.file}: tensor {entry.name}")
        return values

    owner, _, child = name.rpartition(".")
    module = base.get_submodule(owner)
    if child != "weight" or len(entry.shape) != 2:
        return BaseWeight(nn.Module(), read, (1, entry.numel), False, None)
    transposed = isinstance(module, Conv1D)
    shape = entry.shape[::-1] if transposed else entry.shape
    return BaseWeight(module, read, (shape[0], shape[1]), transposed, None)


def _reader(module: QuantMatrices, entry: StoredTensor, source: SafetensorsFolder) -> Read:
    """Return a reader of the flattened matrices ``[out_features, in_features]`` of ``module``, one after the other."""
    whole: tuple[int, torch.Tensor] | None = None  # a matrix and its place among the stacked ones

    def read(start: int, stop: int) -> torch.Tensor:
        nonlocal whole
        index, shift = start // module.numel, start // module.numel * module.numel
        if module.stored is None or not module.stored.transposed:
            weights = source.read(entry, start, stop)
            require_finite(weights, f"{entry.file}: tensor {entry.name}")
            return weights
        if whole is None or whole[0] != index:  # transposed: a row is not contiguous in the file, so read the matrix
            stored = source.read(entry, shift, shift + module.numel).view(module.in_features, module.out_features)
            require_finite(stored, f"{entry.file}: tensor {entry.name}")
            whole = index, stored.t().reshape(-1)
        return whole[1][start - shift : stop - shift]

    return read


@torch.no_grad()
def stream_linear(module: QuantMatrices, read: Read, ranks: Ranks) -> None:
    """Quantize this rank's rows of a weight and write them into ``module``. Every rank calls it.

    Args:
        module: an allocated layer, sharded (each rank fills its own rows) or not.
        read: called with ``(start, stop)``; returns those elements of the flattened weight (all its matrices, one
            after the other), in their own dtype. Each call asks for a bounded number of elements.
        ranks: the ranks to exchange statistics with.
    """
    first, last = _rows_of(module.packed, ranks)
    packed = _own_rows(module.packed, first, last)
    quant_format = module.quant_format
    absmax = torch.zeros(last - first, quant_format.row_statistics, dtype=torch.float32, device=ranks.device)

    def quantize_mine() -> None:
        for start, stop, begin, end in _chunks(module, first, last):
            codes, found = quant_format.quantize_run(read(begin, end).to(ranks.device), module.in_features)
            packed[start - first : stop - first].copy_(quant_format.pack(codes, stop - start))
            absmax[start - first : stop - first].view(-1)[: found.numel()] = found

    on_every(quantize_mine, ranks)
    if not isinstance(module.packed, DTensor):
        everywhere = absmax.new_zeros(module.packed.shape[0], absmax.shape[1])
        everywhere[first:last] = absmax
        for whole in (module.packed, everywhere):
            _exchange_rows(whole, ranks)
        absmax, first, last = everywhere, 0, len(everywhere)
    if module.nested is None:
        local_tensor(module.absmax).copy_(float_to_bits(absmax))
    else:
        _nest(module, absmax, first, last, ranks)


def _overlaps(module: QuantMatrices, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(matrix, start, stop)``: the rows of each matrix within ``[first, last)``."""
    each = module.rows_each
    for index in range(first // each, -(-last // each) if last > first else 0):
        yield index, max(first, index * each), min(last, (index + 1) * each)


def _chunks(module: QuantMatrices, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(start row, stop row, first element, end element)`` of bounded pieces, none across two matrices."""
    # Rows are numbered across all matrices, and each matrix starts on its own row, so its last row may be partial. The
    # flattened weight has no such gaps: matrix `index` starts at element index * numel, and its elements end at numel.
    weights = module.quant_format.row_weights(module.in_features)
    size = max(1, CHUNK_WEIGHTS // weights)
    for index, low, high in _overlaps(module, first, last):
        base, shift = index * module.rows_each, index * module.numel
        for start in range(low, high, size):
            stop = min(start + size, high)
            begin, end = ((row - base) * weights for row in (start, stop))
            yield start, stop, shift + min(begin, module.numel), shift + min(end, module.numel)


def _nest(module: QuantMatrices, absmax: torch.Tensor, first: int, last: int, ranks: Ranks) -> None:
    """Quantize the statistics of this rank's rows, subtracting each matrix's own mean.

    A nested block is quantized whole, by every rank that holds one of its rows, from the same values. An example with
    ``together = 4`` rows to a nested block, for a rank with rows 2 to 8 of a matrix:

        row - base     | 0   1   2   3 | 4   5   6   7 | 8   9  10  11 |
        rows to fill           |------- start to stop -----|               start - base = 2, stop - base = 9
        own            |----------------- low to high -----------------|   low = 0, high = 12; cut at ``blocks``
        mine           (start - base - low) * columns codes into ``own``, (stop - start) * columns of them

    ``base`` is the first row of the matrix, and ``first`` the first row of this rank's shard.
    """
    quant_format = module.quant_format
    columns, together = quant_format.row_statistics, quant_format.nested_rows
    blocks = quant_format.num_statistics(module.out_features, module.in_features)
    everywhere = _of_all_ranks(module, absmax, ranks).view(module.count, -1)
    offsets = torch.stack([matrix[:blocks].mean() for matrix in everywhere])
    assert isinstance(module.offset, torch.Tensor) and module.nested is not None
    module.offset.copy_(offsets)
    coded, nested = local_tensor(module.absmax), local_tensor(module.nested)
    for index, start, stop in _overlaps(module, first, last):
        base = index * module.rows_each
        low, high = (start - base) // together * together, -(-(stop - base) // together) * together
        own = everywhere[index, low * columns : min(high * columns, blocks)]  # the matrix's last row may be partial
        codes, found = quant_format.nest(own, offsets[index])
        mine = codes[(start - base - low) * columns :][: (stop - start) * columns]
        of_rows = nested_of_rows(quant_format, found, start - base, stop - base)
        rows = slice(start - first, stop - first)
        coded[rows].copy_(values_to_rows(mine, stop - start, columns))
        nested[rows].copy_(values_to_rows(float_to_bits(of_rows), stop - start, 1))


def _of_all_ranks(module: QuantMatrices, absmax: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return the float32 absmax ``[rows, statistics]`` of all rows: floating-point means depend on summation order."""
    rows = module.packed.shape[0]
    if not isinstance(module.packed, DTensor):
        return absmax
    padded = torch.zeros(row_range(rows, 0, ranks.shard_size)[1], absmax.shape[1], device=absmax.device)
    padded[: absmax.shape[0]] = absmax
    return torch.cat(all_gather(padded, ranks.shard_group))[:rows]


def _rows_of(parameter: torch.Tensor, ranks: Ranks) -> tuple[int, int]:
    """Return the dim-0 range of ``parameter`` that this rank reads: its shard, or its part of what all keep whole.

    Raises:
        NumericsError: if FSDP's shard is another range.
    """
    rows = parameter.shape[0] if parameter.dim() else 1
    if not isinstance(parameter, DTensor):
        return row_range(rows, ranks.rank, ranks.size)
    start, stop = row_range(rows, ranks.shard_rank, ranks.shard_size)
    local = parameter.to_local().shape[0]
    if local != stop - start:
        raise NumericsError(f"FSDP gave this rank {local} rows of {rows}, but the layout expects {stop - start}.")
    return start, stop


def _own_rows(parameter: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return the rows that this rank reads: all of its shard, or a part of what it keeps whole."""
    if isinstance(parameter, DTensor):
        return local_tensor(parameter)
    return parameter.detach()[first:last] if parameter.dim() else parameter.detach()


@torch.no_grad()
def _exchange_rows(whole: torch.Tensor, ranks: Ranks) -> None:
    """Send each rank's rows of a tensor that all keep whole to the others; every rank has filled its own."""
    if ranks.size == 1:
        return
    data = whole.detach().view(-1).view(torch.uint8).view(max(1, *whole.shape[:1]), -1)
    for rank in range(ranks.size):
        start, stop = row_range(data.shape[0], rank, ranks.size)
        if stop > start:
            dist.broadcast(data[start:stop], group_src=rank, group=ranks.group)


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Split a range of elements into pieces of `CHUNK_WEIGHTS`."""
    return ((a, min(a + CHUNK_WEIGHTS, stop)) for a in range(start, stop, CHUNK_WEIGHTS))


def _fill_kept(parameter: torch.Tensor, weight: BaseWeight, ranks: Ranks) -> None:
    first, last = _rows_of(parameter, ranks)
    width = prod(parameter.shape[1:])
    local = _own_rows(parameter, first, last).view(-1)

    def fill_mine() -> None:
        for a, b in _pieces(first * width, last * width):
            local[a - first * width : b - first * width] = weight.read(a, b)

    on_every(fill_mine, ranks)
    if not isinstance(parameter, DTensor):
        _exchange_rows(parameter, ranks)


def resident_bytes(module: QuantMatrices) -> int:
    """Return the bytes of ``module``'s packed weights and statistics on this rank."""
    parts = [getattr(module, name) for name in ("packed", *STATISTICS)]
    return sum(local_tensor(p).numel() * p.element_size() for p in parts if p is not None)
