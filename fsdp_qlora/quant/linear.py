"""`QuantLinear`: a frozen linear layer whose 4-bit weight and statistics are plain parameters that FSDP2 can shard.

It has no ``.weight``: nothing of upstream can mistake packed bytes for numbers. The weight is dequantized inside
forward and again inside backward, so autograd keeps nothing full-size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_qlora.plan.layout import ROW_BLOCKS, num_rows
from fsdp_qlora.quant.formats import QuantFormat, QuantizedTensor, dequantize
from fsdp_qlora.quant.packing import ROW_ELEMENTS, STORAGE_DTYPE

STATISTICS = ("absmax", "nested")
"""Names of the parameters beside ``packed``."""


class _QuantMatmul(torch.autograd.Function):
    """``x @ dequantize(weight).T``; its backward gives the gradient of ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear, *parts: torch.Tensor) -> torch.Tensor:
        # FSDP frees and refills the storage of the gathered parameters: saving them costs nothing between the passes.
        ctx.save_for_backward(*parts)
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, absmax, *nested = ctx.saved_tensors
        layer, (grad,) = ctx.layer, grads
        quantized = QuantizedTensor(packed, absmax, nested[0] if nested else None, layer.offset)
        weight = dequantize(quantized, layer.quant_format, layer.shape, grad.dtype)
        return (grad @ weight, None, None, None, *(None for _ in nested))


class QuantLinear(nn.Module):
    """A linear layer with a frozen weight in ``quant_format``.

    Parameters (all frozen): ``packed`` bfloat16 ``[rows, 4096]``, ``absmax`` ``[rows, 256]``, ``nested`` int32
    ``[rows, 1]`` (double quantization only), ``bias`` ``[out_features]`` or None. ``offset`` is a float32 buffer.

    Shapes: ``[..., in_features]`` -> ``[..., out_features]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quant_format: QuantFormat,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.quant_format = in_features, out_features, quant_format
        rows = num_rows(in_features * out_features)
        self.packed = _frozen(torch.empty(rows, ROW_ELEMENTS, dtype=STORAGE_DTYPE, device=device))
        self.absmax = _frozen(torch.empty(rows, ROW_BLOCKS, dtype=quant_format.absmax_dtype, device=device))
        self.nested = None
        offset = None
        if quant_format.double_quant:
            self.nested = _frozen(torch.empty(rows, 1, dtype=torch.int32, device=device))
            offset = torch.empty((), dtype=torch.float32, device=device)
        self.register_buffer("offset", offset, persistent=False)
        self.bias = _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the weight."""
        return self.out_features, self.in_features

    def quantized(self) -> QuantizedTensor:
        """Return the parameters as they are now (gathered, inside an FSDP forward)."""
        return QuantizedTensor(self.packed, self.absmax, self.nested, self.offset)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight ``[out_features, in_features]`` in ``dtype``."""
        with torch.no_grad():
            return dequantize(self.quantized(), self.quant_format, self.shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``."""
        if torch.is_grad_enabled() and x.requires_grad:
            parts = (p for p in (self.packed, self.absmax, self.nested) if p is not None)
            out = _QuantMatmul.apply(x, self, *parts)
        else:
            out = F.linear(x, self.dequantize(x.dtype))
        return out if self.bias is None else out + self.bias  # type: ignore[operator]

    @torch.no_grad()
    def fill(self, quantized: QuantizedTensor) -> None:
        """Write this rank's rows of ``quantized`` (all rows where the layer is not sharded) into the parameters."""
        for name in ("packed", *STATISTICS):
            value, parameter = getattr(quantized, name), getattr(self, name)
            if parameter is not None:
                local_tensor(parameter).copy_(value)
        if isinstance(self.offset, torch.Tensor) and quantized.offset is not None:
            self.offset.copy_(quantized.offset)

    def extra_repr(self) -> str:
        """Show shape and format, as `nn.Linear` shows its shape."""
        kind = f"{self.quant_format.name}{'+dq' if self.quant_format.double_quant else ''}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor, or the tensor itself (call under ``torch.no_grad`` to write into it)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[attr-defined]


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
