"""int8: LLM.int8 (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339), op for op as bitsandbytes computes it.

A row of storage is a row of the matrix, with its own statistic (section 2), so a rank can quantize its rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.formats.format import Format, QuantizedTensor, register
from fsdp_qlora.quant.packing import bits_to_float


@register
@dataclass(frozen=True)
class Int8(Format):
    """8-bit rows, multiplied in 8 bits in forward; backward uses the dequantized weight."""

    name = "int8"
    storage_dtype = torch.int8
    dense_forward = False
    takes = frozenset({"threshold"})

    def row_bytes(self, in_features: int) -> int:
        """Return the number of bytes of codes in a row."""
        return in_features

    def describe(self) -> str:
        """Describe the format in words."""
        return f"{self.name} (threshold {self.threshold:g})" if self.threshold else f"{self.name} (no threshold)"

    def quantize_run(self, weights: torch.Tensor, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a flat run of whole rows: codes int8 ``[n / in_features, in_features]``, absmax float32 ``[rows]``.

        Raises:
            NumericsError: if a weight is out of range for float16, which bitsandbytes quantizes from.
        """
        if weights.numel() == 0:
            empty = torch.empty(0, device=weights.device)
            return empty.to(torch.int8).view(0, in_features), empty.float()
        half = weights.view(-1, in_features).to(torch.float16)
        codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(half)
        if not bool(torch.isfinite(absmax).all()):
            raise NumericsError("int8: a weight is outside float16's range (65504); use quant=nf4 or none for it.")
        return codes, absmax

    def dequantize(self, quantized: QuantizedTensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the weights of ``shape`` and ``dtype``, dequantized as ``MatMul8bitLt`` does in backward."""
        scale = bits_to_float(quantized.absmax).mul(1.0 / 127.0)
        return quantized.packed.to(dtype, copy=True).mul_(scale).view(shape)

    def multiply(self, x: torch.Tensor, quantized: QuantizedTensor) -> torch.Tensor:
        """Return ``x @ weight.T``, multiplied in 8 bits: ``[tokens, in]`` -> ``[tokens, out]``.

        LLM.int8's product (equation 8), op for op as bitsandbytes' ``MatMul8bitLt``: each token is quantized by its own
        absmax. With a threshold, columns of ``x`` with a value of at least that magnitude are multiplied in ``x``'s
        dtype with the dequantized columns of the weight, and added to the 8-bit product.
        """
        if x.shape[0] == 0:
            return x.new_empty(0, quantized.packed.shape[0])
        weight, absmax = quantized.packed, bits_to_float(quantized.absmax).view(-1)
        ops = torch.ops.bitsandbytes
        codes, scales, outliers = ops.int8_vectorwise_quant.default(x.to(torch.float16), self.threshold)
        if self.threshold == 0.0:
            return ops.int8_scaled_mm.default(codes, weight, scales, absmax, bias=None, dtype=x.dtype)
        return ops.int8_mixed_scaled_mm.default(x, codes, weight, scales, absmax, outliers, None)[0]
