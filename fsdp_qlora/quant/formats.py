"""`QuantFormat`: how weights become codes and statistics, and back, on bitsandbytes' registered ops.

Formats: NF4 and double quantization are from QLoRA (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314,
sections 3 and 3.1); FP4 is bitsandbytes' 4-bit float; int8 is LLM.int8 (Dettmers et al., 2022,
https://arxiv.org/abs/2208.07339). Every function here works on *whole rows* of storage (`shapes/rows.py`), so
quantizing a tensor slice by slice gives bit for bit what `bitsandbytes.functional.quantize_4bit` (or
`int8_vectorwise_quant`) gives for the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from bitsandbytes.functional import create_dynamic_map

from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.lookup import quantize_nf4
from fsdp_qlora.quant.packing import (
    STORAGE_DTYPE,
    bits_to_float,
    bytes_to_rows,
    float_to_bits,
    rows_to_bytes,
    values_to_rows,
)
from fsdp_qlora.shapes.rows import ROW_BLOCKS, ROW_WEIGHTS, QuantLayout

_CPU_WEIGHTS = 16 * ROW_WEIGHTS
"""Weights quantized at a time on a CPU: bitsandbytes makes several float32 copies there. In its caches they take half
the time, and they stay small."""


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the 256 values of bitsandbytes' signed 8-bit dynamic type, float32, on ``device``."""
    return create_dynamic_map().to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one CPU thread: the mean over absmax values depends on the number of threads otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class QuantFormat(QuantLayout):
    """A format of quantized weights, with what computes in it."""

    @classmethod
    def of(cls, layout: QuantLayout) -> QuantFormat:
        """Return the format of a planned layout."""
        return cls(layout.name, layout.double_quant, layout.block_size, layout.threshold)

    @property
    def absmax_dtype(self) -> torch.dtype:
        """Dtype of the ``absmax`` parameter: 8-bit codes, or the bits of float32 values."""
        return torch.uint8 if self.double_quant else torch.int32

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the ``packed`` parameter."""
        return torch.int8 if self.is_int8 else STORAGE_DTYPE

    def quantize_run(self, weights: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a flat run of whole rows of storage (only the tensor's last one may be partial).

        Args:
            weights: float vector ``[n]`` (bf16, fp16 or fp32).
            in_features: of the matrix that they are part of.

        Returns:
            The codes, uint8 ``[ceil(n / 2)]`` (int8: ``[n / in_features, in_features]``), and absmax, float32
            ``[ceil(n / block_size)]`` (int8: ``[n / in_features]``).

        Raises:
            NumericsError: if a weight is out of float16's range, from which bitsandbytes makes int8.
        """
        if not self.is_int8:
            return self.quantize_blocks(weights)
        if weights.numel() == 0:
            empty = torch.empty(0, device=weights.device)
            return empty.to(torch.int8).view(0, in_features), empty.float()
        half = weights.view(-1, in_features).to(torch.float16)
        codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(half)
        if not bool(torch.isfinite(absmax).all()):
            raise NumericsError("int8: a weight is out of float16's range (65504); use quant=nf4 or none for it.")
        return codes, absmax

    def quantize_blocks(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a flat run of whole 4-bit blocks; see `quantize_run`."""
        if weights.numel() == 0:
            empty = torch.empty(0, device=weights.device)
            return empty.to(torch.uint8), empty.float()
        size = _CPU_WEIGHTS if weights.device.type == "cpu" else weights.numel()
        parts = [self._quantize_piece(piece) for piece in weights.split(size)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])

    def _quantize_piece(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole_blocks = weights.numel() % self.block_size == 0
        if self.name == "nf4" and weights.dtype == torch.bfloat16 and weights.device.type == "cpu" and whole_blocks:
            found = quantize_nf4(weights, self.block_size)
            if found is not None:
                return found
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weights, self.block_size, self.name, torch.uint8)
        return codes.reshape(-1), absmax

    def pack(self, codes: torch.Tensor, rows: int) -> torch.Tensor:
        """Return `quantize_run`'s codes as ``rows`` rows of storage."""
        return codes if self.is_int8 else bytes_to_rows(codes, rows)

    @staticmethod
    def code(device: torch.device) -> torch.Tensor:
        """Return the 256 float32 values that 8-bit statistics stand for."""
        return _dynamic_map(device)

    def nest(self, absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize statistics: absmax float32 ``[b]`` minus its offset to uint8 ``[b]``, float32 ``[ceil(b/256)]``.

        ``offset`` is the mean of the *whole* tensor's absmax, float32 ``[]``.
        """
        if absmax.numel() == 0:
            return absmax.to(torch.uint8), absmax
        code = self.code(absmax.device)
        return torch.ops.bitsandbytes.quantize_blockwise.default(absmax - offset, code, ROW_BLOCKS)

    def unnest(self, absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Return the float32 statistics ``[b]`` of `nest`'s codes and the nested statistic of each of their rows."""
        code = self.code(absmax.device)
        if self.nested_rows == 1:
            values = torch.ops.bitsandbytes.dequantize_blockwise.default(
                absmax, nested, code, ROW_BLOCKS, torch.float32
            )
        else:  # the first row may be within a nested block
            values = code[absmax.long()].mul_(nested.repeat_interleave(self.row_statistics)[: absmax.numel()])
        values += offset
        return values


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor in rows of storage, or some of its rows; what `QuantLinear`'s parameters hold."""

    packed: torch.Tensor
    """bfloat16 ``[rows, 4096]``: 8,192 bytes of codes a row. int8 ``[out_features, in_features]`` for int8."""
    absmax: torch.Tensor
    """uint8 ``[rows, 16384 / block_size]`` (double quantization), else int32, the bits of float32; a row of int8 has
    one."""
    nested: torch.Tensor | None
    """int32 ``[rows, 1]``, the bits of float32; None without double quantization."""
    offset: torch.Tensor | None
    """float32 ``[]``, mean of the whole tensor's absmax; None without double quantization."""


def nested_of_rows(quant_format: QuantFormat, nested: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return the nested statistic of each of the rows ``[first, last)``, from those of all blocks or from the first's.

    ``nested`` begins with the nested block of row ``first``.
    """
    each = quant_format.nested_rows
    return nested if each == 1 else nested.repeat_interleave(each)[first % each :][: last - first]


def to_rows(
    quant_format: QuantFormat, codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor | None, rows: int
) -> QuantizedTensor:
    """Lay `QuantFormat.quantize_run`'s result of a whole tensor into ``rows`` rows, nesting the statistics if asked."""
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


def quantize(weight: torch.Tensor, quant_format: QuantFormat) -> QuantizedTensor:
    """Quantize a whole float tensor: of any shape to 4-bit, a matrix to int8.

    Bit-equal to `bitsandbytes.functional.quantize_4bit` and `int8_vectorwise_quant`.
    """
    width = weight.shape[-1]
    with one_thread():
        codes, absmax = quant_format.quantize_run(weight.reshape(-1), width)
        offset = absmax.mean() if quant_format.double_quant else None
        rows = quant_format.num_rows(weight.numel() // max(1, width), width)
        return to_rows(quant_format, codes, absmax, offset, rows)


def dequantize(
    quantized: QuantizedTensor, quant_format: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights of ``shape`` and ``dtype`` that all rows of ``quantized`` stand for."""
    if quant_format.is_int8:  # as MatMul8bitLt does in backward
        scale = bits_to_float(quantized.absmax).mul(1.0 / 127.0)
        return quantized.packed.to(dtype, copy=True).mul_(scale).view(shape)
    numel = prod(shape)
    codes = rows_to_bytes(quantized.packed, numel)
    absmax = quantized.absmax.reshape(-1)[: quant_format.num_statistics(1, numel)]
    if quantized.nested is not None and quantized.offset is not None:
        nested = bits_to_float(quantized.nested).reshape(-1)
        absmax = quant_format.unnest(absmax, nested, quantized.offset)
    else:
        absmax = bits_to_float(absmax)
    return dequantize_codes(codes, absmax, quant_format, shape, dtype)


def dequantize_codes(
    codes: torch.Tensor, absmax: torch.Tensor, quant_format: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights of ``shape`` of 4-bit codes, uint8 ``[ceil(n / 2)]``, and float32 absmax ``[blocks]``."""
    size, numel, own = quant_format.block_size, prod(shape), shape
    if shape[-1] % size:  # bitsandbytes' CPU kernel takes another absmax than it should where blocks cross rows
        own = (numel // size, size) if numel % size == 0 else (1, numel)
    found = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, size, quant_format.name, list(own), dtype)
    return found.view(shape)


def multiply_int8(x: torch.Tensor, quantized: QuantizedTensor, threshold: float) -> torch.Tensor:
    """Return ``x @ weight.T`` of an int8 weight, multiplied in 8 bit: ``[tokens, in]`` -> ``[tokens, out]``.

    LLM.int8's product (https://arxiv.org/abs/2208.07339, equation 8), op for op as bitsandbytes' ``MatMul8bitLt``: each
    token is quantized by its own absmax; with a threshold, columns of ``x`` that hold a value of that magnitude are
    multiplied in ``x``'s dtype with the dequantized columns of the weight, and their sum is added.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, quantized.packed.shape[0])
    weight, absmax = quantized.packed, bits_to_float(quantized.absmax).view(-1)
    ops = torch.ops.bitsandbytes
    codes, scales, outliers = ops.int8_vectorwise_quant.default(x.to(torch.float16), threshold)
    if threshold == 0.0:
        return ops.int8_scaled_mm.default(codes, weight, scales, absmax, bias=None, dtype=x.dtype)
    return ops.int8_mixed_scaled_mm.default(x, codes, weight, scales, absmax, outliers, None)[0]
