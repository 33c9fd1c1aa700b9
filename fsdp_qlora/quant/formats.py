"""`QuantFormat`: how weights become 4-bit codes and statistics, and back, on bitsandbytes' registered ops.

Formats: NF4 and double quantization are from QLoRA (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314,
sections 3 and 3.1); FP4 is bitsandbytes' 4-bit float. Every function here works on *whole nested blocks* of a flattened
weight, so quantizing a tensor slice by slice gives bit for bit what `bitsandbytes.functional.quantize_4bit` gives for
the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from bitsandbytes.functional import create_dynamic_map

from fsdp_qlora.plan.layout import BLOCK_WEIGHTS, ROW_BLOCKS, ROW_WEIGHTS, num_blocks, num_rows
from fsdp_qlora.quant.packing import (
    bits_to_float,
    bytes_to_rows,
    float_to_bits,
    rows_to_bytes,
    values_to_rows,
)

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
class QuantFormat:
    """A 4-bit format: the code book and whether the statistics are quantized too."""

    name: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    block_size: int = BLOCK_WEIGHTS

    @property
    def absmax_dtype(self) -> torch.dtype:
        """Dtype of the ``absmax`` parameter: 8-bit codes, or the bits of float32 values."""
        return torch.uint8 if self.double_quant else torch.int32

    def quantize_blocks(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a flat run of whole blocks (only the tensor's last one may be partial).

        Args:
            weights: float vector ``[n]`` (bf16, fp16 or fp32).

        Returns:
            The codes, uint8 ``[ceil(n / 2)]``, and absmax, float32 ``[ceil(n / 64)]``.
        """
        if weights.numel() == 0:
            empty = torch.empty(0, device=weights.device)
            return empty.to(torch.uint8), empty.float()
        size = _CPU_WEIGHTS if weights.device.type == "cpu" else weights.numel()
        parts = [self._quantize_piece(piece) for piece in weights.split(size)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])

    def _quantize_piece(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weights, self.block_size, self.name, torch.uint8)
        return codes.reshape(-1), absmax

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
        """Return the float32 statistics of `nest`'s result."""
        code = self.code(absmax.device)
        values = torch.ops.bitsandbytes.dequantize_blockwise.default(absmax, nested, code, ROW_BLOCKS, torch.float32)
        values += offset
        return values


@dataclass(frozen=True)
class QuantizedTensor:
    """A 4-bit tensor in the block-aligned layout, or some of its rows; what `QuantLinear`'s parameters hold."""

    packed: torch.Tensor
    """bfloat16 ``[rows, 4096]``: 8,192 bytes of codes a row."""
    absmax: torch.Tensor
    """uint8 ``[rows, 256]`` (double quantization) or int32 ``[rows, 256]``, the bits of float32."""
    nested: torch.Tensor | None
    """int32 ``[rows, 1]``, the bits of float32; None without double quantization."""
    offset: torch.Tensor | None
    """float32 ``[]``, mean of the whole tensor's absmax; None without double quantization."""


def to_rows(
    quant_format: QuantFormat, codes: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor | None, rows: int
) -> QuantizedTensor:
    """Lay `QuantFormat.quantize_blocks`' result into ``rows`` aligned rows, nesting the statistics if asked for."""
    if not quant_format.double_quant:
        bits = values_to_rows(float_to_bits(absmax), rows, ROW_BLOCKS)
        return QuantizedTensor(bytes_to_rows(codes, rows), bits, None, None)
    assert offset is not None
    coded, nested = quant_format.nest(absmax, offset)
    return QuantizedTensor(
        bytes_to_rows(codes, rows),
        values_to_rows(coded, rows, ROW_BLOCKS),
        values_to_rows(float_to_bits(nested), rows, 1),
        offset,
    )


def quantize(weight: torch.Tensor, quant_format: QuantFormat) -> QuantizedTensor:
    """Quantize a whole float tensor of any shape; bit-equal to `bitsandbytes.functional.quantize_4bit`."""
    with one_thread():
        codes, absmax = quant_format.quantize_blocks(weight.reshape(-1))
        offset = absmax.mean() if quant_format.double_quant else None
        return to_rows(quant_format, codes, absmax, offset, num_rows(weight.numel()))


def dequantize(
    quantized: QuantizedTensor, quant_format: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights of ``shape`` and ``dtype`` that all rows of ``quantized`` stand for."""
    numel = 1
    for size in shape:
        numel *= size
    codes = rows_to_bytes(quantized.packed, numel)
    absmax = quantized.absmax.reshape(-1)[: num_blocks(numel)]
    if quantized.nested is not None and quantized.offset is not None:
        nested = bits_to_float(quantized.nested).reshape(-1)
        absmax = quant_format.unnest(absmax, nested, quantized.offset)
    else:
        absmax = bits_to_float(absmax)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, quant_format.block_size, quant_format.name, list(shape), dtype
    )
