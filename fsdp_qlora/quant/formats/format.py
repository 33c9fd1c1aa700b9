"""`Format`: the storage, cost and computation of a format of quantized weights.

A weight is quantized in *rows of storage*: FSDP2 shards along dimension 0, so a rank holds whole rows and must be able
to quantize and dequantize them alone. A row has its codes, as bytes, and its *statistics* (``absmax``), the same number
for each row. The statistics may themselves be quantized (double quantization, QLoRA, Dettmers et al., 2023,
https://arxiv.org/abs/2305.14314, section 3.1): minus their mean over the whole tensor, they are quantized to 8 bits in
blocks of 256, the *nested* blocks.

    weights of a row    ->  packed [rows, ...]         absmax [rows, k]        nested [rows, 1]    offset []
                            codes, as storage_dtype    uint8, or bits of       bits of float32     float32, the mean of
                                                       float32 as int32                            all absmax
                                                                               '------ double quantization only ------'

Statistics are integers because FSDP2 casts floating-point parameters when it gathers them (docs/architecture.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import ClassVar

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from bitsandbytes.functional import create_dynamic_map

from fsdp_qlora.config import choices
from fsdp_qlora.quant.packing import BLOCK_WEIGHTS, ROW_BLOCKS, bits_to_float, float_to_bits, values_to_rows
from fsdp_qlora.shapes.linears import LinearShape


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor, or some of its rows of storage: the contents of the parameters of `QuantMatrices`."""

    packed: torch.Tensor
    """Codes, ``[rows, width]`` in the format's `Format.storage_dtype`."""
    absmax: torch.Tensor
    """Statistics, ``[rows, Format.row_statistics]``: uint8 with double quantization, else float32 bits as int32."""
    nested: torch.Tensor | None
    """float32 bits as int32 ``[rows, 1]``; None without double quantization."""
    offset: torch.Tensor | None
    """float32 ``[]``, mean of the whole tensor's statistics; None without double quantization."""


@dataclass(frozen=True)
class Format(ABC):
    """A format of quantized weights. By default, a row of storage is a row of the matrix."""

    name: ClassVar[str]
    """Its name in ``quant=``."""
    storage_dtype: ClassVar[torch.dtype]
    """Dtype of ``packed``: an integer, or bfloat16, which FSDP2 does not cast here."""
    dense_forward: ClassVar[bool] = True
    """Whether forward multiplies with dequantized weights, which cost time and may be kept for backward."""

    takes: ClassVar[frozenset[str]] = frozenset()
    """Names of the options below that this format uses; the others stay at their defaults."""

    double_quant: bool = False
    """Whether the statistics are quantized as well."""
    block_size: int = BLOCK_WEIGHTS
    """Number of weights that share one statistic, for formats that let you choose it."""
    threshold: float = 0.0
    """For formats that quantize inputs: columns with an input of at least this magnitude are not quantized."""
    key: str = field(init=False, default="", repr=False)
    """Name and threshold as one string: compiled code treats it as a constant, but would make a float an input."""

    def __post_init__(self) -> None:
        for name, default in (("double_quant", False), ("block_size", BLOCK_WEIGHTS), ("threshold", 0.0)):
            if name not in self.takes:
                object.__setattr__(self, name, default)
        object.__setattr__(self, "key", f"{self.name}>{self.threshold!r}" if self.threshold else self.name)

    # Storage.

    def num_rows(self, out_features: int, in_features: int) -> int:
        """Return the number of rows of storage for a matrix."""
        return out_features

    def row_weights(self, in_features: int) -> int:
        """Return the number of weights in a row."""
        return in_features

    @abstractmethod
    def row_bytes(self, in_features: int) -> int:
        """Return the number of bytes of codes in a row."""

    def num_statistics(self, out_features: int, in_features: int) -> int:
        """Return the number of statistics for a matrix."""
        return self.num_rows(out_features, in_features) * self.row_statistics

    @property
    def row_statistics(self) -> int:
        """Statistics in a row."""
        return 1

    @property
    def nested_rows(self) -> int:
        """Number of rows whose statistics form one nested block."""
        return max(1, ROW_BLOCKS // self.row_statistics)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of statistics in a row: uint8 each plus one nested float32, or float32 each."""
        return self.row_statistics + 4 if self.double_quant else 4 * self.row_statistics

    @property
    def absmax_dtype(self) -> torch.dtype:
        """Dtype of ``absmax``: 8-bit codes, or the bits of float32 values."""
        return torch.uint8 if self.double_quant else torch.int32

    def describe(self) -> str:
        """Describe the format in words, as a plan prints it."""
        return self.name

    # Computation.

    @abstractmethod
    def quantize_run(self, weights: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a flat run of whole rows of storage (only the tensor's last one may be partial).

        Args:
            weights: float vector ``[n]`` (bf16, fp16 or fp32).
            in_features: of the matrix they belong to.

        Returns:
            The codes, as `pack` takes them, and the statistics, float32 ``[values]``.
        """

    def pack(self, codes: torch.Tensor, rows: int) -> torch.Tensor:
        """Return `quantize_run`'s codes as ``rows`` rows of storage."""
        return codes

    @abstractmethod
    def dequantize(self, quantized: QuantizedTensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return all rows of ``quantized`` as weights of ``shape`` and ``dtype``."""

    def multiply(self, x: torch.Tensor, quantized: QuantizedTensor) -> torch.Tensor | None:
        """Return ``x @ weight.T``, ``[tokens, in]`` -> ``[tokens, out]``, or None to use the dequantized weight."""
        return None

    def cannot_look_up(self, width: int) -> str:
        """Return why rows of a table ``[n, width]`` cannot be looked up on their own; an empty string if they can."""
        return ""

    def look_up(self, table: QuantizedTensor, ids: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``ids``, int64 ``[n]``, of a table: ``[n, width]`` in ``dtype``."""
        nested = None if table.nested is None else table.nested[ids]
        rows = QuantizedTensor(table.packed[ids], table.absmax[ids], nested, table.offset)
        return self.dequantize(rows, (ids.numel(), width), dtype)

    # Double quantization.

    @staticmethod
    def code(device: torch.device) -> torch.Tensor:
        """Return the 256 float32 values that 8-bit statistics decode to."""
        return _dynamic_map(device)

    def nest(self, absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize absmax - offset, float32 ``[b]``, to uint8 codes ``[b]`` and nested float32 ``[ceil(b / 256)]``.

        ``offset`` is the mean of the *whole* tensor's absmax, float32 ``[]``.
        """
        if absmax.numel() == 0:
            return absmax.to(torch.uint8), absmax
        code = self.code(absmax.device)
        return torch.ops.bitsandbytes.quantize_blockwise.default(absmax - offset, code, ROW_BLOCKS)

    def unnest(self, absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Invert `nest`: return the float32 statistics ``[b]``, given codes and the nested statistic of each row."""
        code = self.code(absmax.device)
        if self.nested_rows == 1:
            values = torch.ops.bitsandbytes.dequantize_blockwise.default(
                absmax, nested, code, ROW_BLOCKS, torch.float32
            )
        else:  # the first row may start inside a nested block
            values = code[absmax.long()].mul_(nested.repeat_interleave(self.row_statistics)[: absmax.numel()])
        values += offset
        return values


@dataclass(frozen=True)
class Packed:
    """A linear, or stacked matrices, with its storage format."""

    linear: LinearShape
    quant_format: Format

    @property
    def rows(self) -> int:
        """Rows of packed storage; each of the stacked matrices starts on its own row."""
        return self.linear.count * self.quant_format.num_rows(self.linear.out_features, self.linear.in_features)

    @property
    def row_bytes(self) -> int:
        """Bytes of codes in a row of packed storage."""
        return self.quant_format.row_bytes(self.linear.in_features)

    @property
    def bytes(self) -> int:
        """Bytes of all codes and statistics."""
        return self.rows * (self.row_bytes + self.quant_format.statistics_bytes)

    @property
    def code_bytes(self) -> float:
        """Bytes of code per weight."""
        return self.row_bytes / self.quant_format.row_weights(self.linear.in_features)


_FORMATS: choices.Registry[Format] = choices.Registry("format", choices.FORMATS)
register = _FORMATS.register


def build_format(
    name: str = "nf4", double_quant: bool = True, block_size: int = BLOCK_WEIGHTS, threshold: float = 0.0
) -> Format:
    """Return the format called ``name``; options it does not use stay at their defaults.

    Raises:
        ConfigError: if there is none.
    """
    return _FORMATS[name](double_quant, block_size, threshold)


def format_of_key(key: str, double_quant: bool, block_size: int) -> Format:
    """Return the format with this `Format.key`."""
    name, _, threshold = key.partition(">")
    return build_format(name, double_quant, block_size, float(threshold or 0))


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the 256 values of bitsandbytes' signed 8-bit dynamic type, float32, on ``device``."""
    return create_dynamic_map().to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one CPU thread: otherwise the mean of absmax values depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nested_of_rows(quant_format: Format, nested: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return the nested statistic of each of the rows ``[first, last)``.

    ``nested`` holds one value per nested block, starting with the block that contains row ``first``.
    """
    each = quant_format.nested_rows
    return nested if each == 1 else nested.repeat_interleave(each)[first % each :][: last - first]


def to_rows(
    quant_format: Format, codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor | None, rows: int
) -> QuantizedTensor:
    """Lay out a whole tensor's result of `Format.quantize_run` in ``rows`` rows; nest statistics if the format does."""
    packed, columns = quant_format.pack(codes, rows), quant_format.row_statistics
    if not quant_format.double_quant:
        return QuantizedTensor(packed, values_to_rows(float_to_bits(absmax), rows, columns), None, None)
    assert offset is not None
    coded, nested = quant_format.nest(absmax, offset)
    of_rows = nested_of_rows(quant_format, nested, 0, rows)
    return QuantizedTensor(
        packed,
        values_to_rows(coded, rows, columns),
        values_to_rows(float_to_bits(of_rows), rows, 1),
        offset,
    )


def quantize(weight: torch.Tensor, quant_format: Format) -> QuantizedTensor:
    """Quantize a whole float tensor: any shape for a 4-bit format, a matrix for int8.

    Bit-equal to `bitsandbytes.functional.quantize_4bit` and `int8_vectorwise_quant`.
    """
    width = weight.shape[-1]
    with one_thread():
        codes, absmax = quant_format.quantize_run(weight.reshape(-1), width)
        offset = absmax.mean() if quant_format.double_quant else None
        rows = quant_format.num_rows(weight.numel() // max(1, width), width)
        return to_rows(quant_format, codes, absmax, offset, rows)


def dequantize(
    quantized: QuantizedTensor, quant_format: Format, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return all rows of ``quantized`` as weights of ``shape`` and ``dtype``."""
    return quant_format.dequantize(quantized, shape, dtype)


def statistics_of(quant_format: Format, quantized: QuantizedTensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the float32 statistics of a tensor of ``shape``, ``[Format.num_statistics]``."""
    absmax = quantized.absmax.reshape(-1)[: quant_format.num_statistics(1, prod(shape))]
    if quantized.nested is None or quantized.offset is None:
        return bits_to_float(absmax)
    return quant_format.unnest(absmax, bits_to_float(quantized.nested).reshape(-1), quantized.offset)
