"""`QuantMatrices`: frozen 4-bit matrices whose bytes and statistics are plain parameters that FSDP2 can shard.

What a linear layer, the stacked experts of a layer, an embedding and an output head have in common. There is no
``.weight``: nothing of upstream can mistake packed bytes for numbers. A matrix is dequantized inside forward and again
inside backward, so autograd keeps nothing full-size.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
from torch import nn

from fsdp_qlora.plan.layout import ROW_BLOCKS, ROW_WEIGHTS, SLICE_WEIGHTS, WHOLE_WEIGHTS, LinearShape, num_rows
from fsdp_qlora.quant.formats import QuantFormat, QuantizedTensor, dequantize
from fsdp_qlora.quant.packing import ROW_ELEMENTS, STORAGE_DTYPE

STATISTICS = ("absmax", "nested")
"""Names of the parameters beside ``packed``."""


class _QuantMatmul(torch.autograd.Function):
    """``x @ matrix.T``; its backward gives the gradient of ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, owner: QuantMatrices, index: int, *parts: torch.Tensor) -> torch.Tensor:
        # FSDP frees and refills the storage of the gathered parameters: saving them costs nothing between the passes.
        ctx.save_for_backward(*parts)
        ctx.owner, ctx.index = owner, index
        return owner.multiply(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        owner, (grad,), parts = ctx.owner, grads, ctx.saved_tensors  # once: checkpointing forbids a second look
        quantized = owner.select(ctx.index, *parts)
        if owner.numel <= WHOLE_WEIGHTS:
            found = grad @ dequantize(quantized, owner.quant_format, owner.shape, grad.dtype)
        else:
            flat = grad.flatten(0, -2)
            found = flat.new_zeros(flat.shape[0], owner.in_features)
            for start, stop in owner.slices():
                found.addmm_(flat[:, start:stop], owner.rows_of(quantized, start, stop, grad.dtype))
            found = found.view(*grad.shape[:-1], owner.in_features)
        return (found, None, None, *(None for _ in parts))


class QuantMatrices(nn.Module):
    """``count`` frozen matrices ``[out_features, in_features]`` in ``quant_format``, each from a row of its own on.

    Parameters (all frozen), with R = ceil(out_features * in_features / 16384): ``packed`` bfloat16
    ``[count * R, 4096]``, ``absmax`` ``[count * R, 256]``, ``nested`` int32 ``[count * R, 1]`` (double quantization
    only). ``offset`` is a float32 buffer ``[count]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quant_format: QuantFormat,
        count: int = 1,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.count = in_features, out_features, count
        self.quant_format = quant_format
        self.stored: LinearShape | None = None
        """What it stands for in the unquantized model and its files; None where it was made by hand."""
        self.rows_each = num_rows(in_features * out_features)
        rows = count * self.rows_each
        self.packed = frozen(torch.empty(rows, ROW_ELEMENTS, dtype=STORAGE_DTYPE, device=device))
        self.absmax = frozen(torch.empty(rows, ROW_BLOCKS, dtype=quant_format.absmax_dtype, device=device))
        self.nested = None
        offset = None
        if quant_format.double_quant:
            self.nested = frozen(torch.empty(rows, 1, dtype=torch.int32, device=device))
            offset = torch.empty(count, dtype=torch.float32, device=device)
        self.register_buffer("offset", offset, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of each matrix."""
        return self.out_features, self.in_features

    @property
    def numel(self) -> int:
        """Number of weights of each matrix."""
        return self.out_features * self.in_features

    def parts(self) -> Iterator[torch.Tensor]:
        """Yield the parameters as they are now (gathered, inside an FSDP forward), in the order of `select`."""
        yield from (p for p in (self.packed, self.absmax, self.nested) if p is not None)

    def select(
        self, index: int, packed: torch.Tensor, absmax: torch.Tensor, nested: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """Return matrix ``index`` of gathered parameters."""
        rows = slice(index * self.rows_each, (index + 1) * self.rows_each)
        offset = None if self.offset is None else self.offset[index]  # type: ignore[index]
        return QuantizedTensor(packed[rows], absmax[rows], None if nested is None else nested[rows], offset)

    def quantized(self, index: int = 0) -> QuantizedTensor:
        """Return matrix ``index`` as it is now (gathered, inside an FSDP forward)."""
        return self.select(index, *self.parts())

    def dequantize(self, dtype: torch.dtype, index: int = 0) -> torch.Tensor:
        """Return matrix ``index``, ``[out_features, in_features]`` in ``dtype``."""
        with torch.no_grad():
            return dequantize(self.quantized(index), self.quant_format, self.shape, dtype)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of slices of a matrix's rows that begin on packed rows."""
        step = ROW_WEIGHTS // gcd(ROW_WEIGHTS, self.in_features)
        size = max(step, SLICE_WEIGHTS // self.in_features // step * step)
        for start in range(0, self.out_features, size):
            yield start, min(start + size, self.out_features)

    def multiply(self, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Return ``x @ matrix.T``; of a very large matrix, one slice is dense at a time."""
        if self.numel <= WHOLE_WEIGHTS:
            return x @ self.dequantize(x.dtype, index).t()
        quantized = self.quantized(index)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for start, stop in self.slices():
            out[..., start:stop] = x @ self.rows_of(quantized, start, stop, x.dtype).t()
        return out

    def rows_of(self, whole: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows ``[start, stop)`` of a matrix in ``dtype``; ``start`` must fall on a packed row."""
        first = start * self.in_features // ROW_WEIGHTS
        rows = slice(first, first + num_rows((stop - start) * self.in_features))
        nested = None if whole.nested is None else whole.nested[rows]
        part = QuantizedTensor(whole.packed[rows], whole.absmax[rows], nested, whole.offset)
        with torch.no_grad():
            return dequantize(part, self.quant_format, (stop - start, self.in_features), dtype)

    def matmul(self, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Return ``x @ matrix.T``: ``[..., in_features]`` -> ``[..., out_features]``."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _QuantMatmul.apply(x, self, index, *self.parts())  # type: ignore[return-value]
        with torch.no_grad():
            return self.multiply(x, index)

    @torch.no_grad()
    def fill(self, quantized: QuantizedTensor) -> None:
        """Write this rank's rows of ``quantized`` (all rows where nothing is sharded) into the parameters."""
        for name in ("packed", *STATISTICS):
            value, parameter = getattr(quantized, name), getattr(self, name)
            if parameter is not None:
                local_tensor(parameter).copy_(value)
        if isinstance(self.offset, torch.Tensor) and quantized.offset is not None:
            self.offset.copy_(quantized.offset)

    def extra_repr(self) -> str:
        """Show shape and format, as `nn.Linear` shows its shape."""
        kind = f"{self.quant_format.name}{'+dq' if self.quant_format.double_quant else ''}"
        many = f"count={self.count}, " if self.count > 1 else ""
        return f"{many}in_features={self.in_features}, out_features={self.out_features}, {kind}"


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor, or the tensor itself (call under ``torch.no_grad`` to write into it)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[attr-defined]


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """Return a parameter that is never trained."""
    return nn.Parameter(tensor, requires_grad=False)
