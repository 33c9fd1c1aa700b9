"""nf4 and fp4: 4-bit codes in blocks of the flattened weight, on bitsandbytes' registered ops.

NF4 is QLoRA's 4-bit NormalFloat (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, section 3), FP4 bitsandbytes'
4-bit float. The layout is *block-aligned*: the flattened weight is cut into rows of 16,384 = 64 x 256 elements. With
blocks of 64, a row is exactly one nested block, so a rank can read and quantize its own rows alone. Longer blocks (up
to 4,096) divide a row evenly; their nested blocks span several rows, each with a copy of the nested statistic. Slices
of whole rows are bit-identical to `bitsandbytes.functional.quantize_4bit` on the whole tensor.

    one row      | block 0: 64 weights | block 1 | ...                         | block 255 |   8,192 bytes of codes
    its absmax   |  1                  |  1      | ...                         |  1        |   256 values
    nested       |  1 for all 256                                                          |   1 value
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from fsdp_qlora.quant.formats.format import Format, QuantizedTensor, register, statistics_of
from fsdp_qlora.quant.lookup import quantize_nf4
from fsdp_qlora.quant.packing import (
    BLOCK_WEIGHTS,
    ROW_BYTES,
    ROW_WEIGHTS,
    STORAGE_DTYPE,
    bits_to_float,
    bytes_to_rows,
    num_rows,
    rows_to_bytes,
)

_CPU_WEIGHTS = 16 * ROW_WEIGHTS
"""Weights quantized at a time on a CPU: bitsandbytes makes several float32 copies there. Small pieces fit into the
CPU's caches, which halves the time, and keep the copies small."""


@dataclass(frozen=True)
class Blocks4(Format):
    """A 4-bit format whose blocks are runs of the flattened weight."""

    storage_dtype = STORAGE_DTYPE
    takes = frozenset({"double_quant", "block_size"})
    double_quant: bool = True

    def num_rows(self, out_features: int, in_features: int) -> int:
        """Return the number of rows of storage for a matrix."""
        return num_rows(out_features * in_features)

    def row_weights(self, in_features: int) -> int:
        """Return the number of weights in a row."""
        return ROW_WEIGHTS

    def row_bytes(self, in_features: int) -> int:
        """Return the number of bytes of codes in a row."""
        return ROW_BYTES

    def num_statistics(self, out_features: int, in_features: int) -> int:
        """Return the number of blocks in a matrix; the last one may be partial."""
        return -(-out_features * in_features // self.block_size)

    @property
    def row_statistics(self) -> int:
        """Blocks in a row."""
        return ROW_WEIGHTS // self.block_size

    def describe(self) -> str:
        """Describe the format in words."""
        blocks = f" in blocks of {self.block_size}" if self.block_size != BLOCK_WEIGHTS else ""
        return f"{self.name}{' with double quantization' if self.double_quant else ''}{blocks}"

    def quantize_run(self, weights: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a flat run of whole blocks: codes uint8 ``[ceil(n / 2)]``, absmax ``[ceil(n / block_size)]``."""
        if weights.numel() == 0:
            empty = torch.empty(0, device=weights.device)
            return empty.to(torch.uint8), empty.float()
        size = _CPU_WEIGHTS if weights.device.type == "cpu" else weights.numel()
        parts = [self._quantize_piece(piece) for piece in weights.split(size)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])

    def _quantize_piece(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weights, self.block_size, self.name, torch.uint8)
        return codes.reshape(-1), absmax

    def pack(self, codes: torch.Tensor, rows: int) -> torch.Tensor:
        """Return `quantize_run`'s codes as ``rows`` rows of storage, bfloat16 ``[rows, 4096]``."""
        return bytes_to_rows(codes, rows)

    def dequantize(self, quantized: QuantizedTensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return all rows of ``quantized`` as weights of ``shape`` and ``dtype``."""
        codes = rows_to_bytes(quantized.packed, prod(shape))
        return self.dequantize_codes(codes, statistics_of(self, quantized, shape), shape, dtype)

    def dequantize_codes(
        self, codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantize codes, uint8 ``[ceil(n / 2)]``, with float32 absmax ``[blocks]`` to ``shape``."""
        size, numel, own = self.block_size, prod(shape), shape
        if shape[-1] % size:  # bitsandbytes' CPU kernel uses the wrong absmax if blocks cross rows, so reshape
            own = (numel // size, size) if numel % size == 0 else (1, numel)
        weights = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, size, self.name, list(own), dtype)
        return weights.view(shape)

    def cannot_look_up(self, width: int) -> str:
        """Return why rows of a table cannot be looked up on their own, or an empty string if they can."""
        return f"the hidden size {width} is not a multiple of {self.block_size}" if width % self.block_size else ""

    def look_up(self, table: QuantizedTensor, ids: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows ``ids``, int64 ``[n]``, of a table: ``[n, width]`` in ``dtype``; no others are dequantized.

        Row ``i`` of the table starts at element ``i * width`` of the flattened weight. A row may cross into the next
        row of storage, so each block takes the nested statistic of the storage row it lies in.
        """
        numel = table.packed.shape[0] * ROW_WEIGHTS // width * width
        codes = rows_to_bytes(table.packed, numel).view(-1, width // 2)[ids]
        absmax = self._absmax(table, ids, width // self.block_size)
        return self.dequantize_codes(codes.reshape(-1), absmax.reshape(-1), (ids.numel(), width), dtype)

    def _absmax(self, table: QuantizedTensor, ids: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return the float32 statistics ``[ids, blocks]`` of the rows ``ids``."""
        places = ids[:, None] * blocks + torch.arange(blocks, device=ids.device)
        coded = table.absmax.reshape(-1)[places]
        if table.nested is None or table.offset is None:
            return bits_to_float(coded)
        nested = bits_to_float(table.nested).reshape(-1)[places * self.block_size // ROW_WEIGHTS]
        return self.code(ids.device)[coded.long()] * nested + table.offset


@register
class NF4(Blocks4):
    """4-bit NormalFloat: the 16 values are quantiles of a normal distribution."""

    name = "nf4"

    def _quantize_piece(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole_blocks = weights.numel() % self.block_size == 0
        if weights.dtype == torch.bfloat16 and weights.device.type == "cpu" and whole_blocks:
            quantized = quantize_nf4(weights, self.block_size)
            if quantized is not None:
                return quantized
        return super()._quantize_piece(weights)


@register
class FP4(Blocks4):
    """4-bit float."""

    name = "fp4"
