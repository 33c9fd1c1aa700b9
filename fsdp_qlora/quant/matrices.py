"""`QuantMatrices`: frozen quantized matrices whose bytes and statistics are plain parameters that FSDP2 can shard.

The common base of quantized linears, stacked experts, embeddings and output heads. There is no ``.weight``, so no
upstream code can mistake packed bytes for numbers. A matrix is dequantized inside forward and again inside backward
(`quant/products.py`), so autograd saves nothing full-size; unless it is kept dense (`keep_dense`).
"""

from __future__ import annotations

import torch
from torch import nn

from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.quant.formats import Format, QuantizedTensor
from fsdp_qlora.quant.grouped import densify_stack
from fsdp_qlora.quant.matrix import WHOLE_WEIGHTS, Matrix
from fsdp_qlora.quant.packing import BLOCK_WEIGHTS
from fsdp_qlora.quant.products import densify, multiply
from fsdp_qlora.quant.stack import Stack
from fsdp_qlora.shapes.linears import LinearShape

STATISTICS = ("absmax", "nested")
"""Names of the parameters that hold statistics, as opposed to ``packed``."""


class QuantMatrices(nn.Module):
    """``count`` frozen matrices ``[out_features, in_features]`` in ``quant_format``, each starting on its own row.

    Parameters (all frozen) of a 4-bit format, with R = ceil(out_features * in_features / 16384): ``packed`` bfloat16
    ``[count * R, 4096]``, ``absmax`` ``[count * R, 16384 / block_size]``, ``nested`` int32 ``[count * R, 1]`` (double
    quantization only). ``offset`` is a float32 buffer ``[count]``, and ``dense`` one of ``[count, out_features,
    in_features]`` if the matrices are kept dense. Of int8, with R = out_features: ``packed`` int8
    ``[count * R, in_features]`` and ``absmax`` int32 ``[count * R, 1]``, the bits of each row's float32 absmax.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quant_format: Format,
        count: int = 1,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.count = in_features, out_features, count
        self.quant_format = quant_format
        self.cache_dequantized = False
        """Whether to keep the dense matrix from forward to backward; by default backward dequantizes it again."""
        self.stored: LinearShape | None = None
        """The linear it replaces in the unquantized model and its files; None if it was built by hand."""
        self.rows_each = quant_format.num_rows(out_features, in_features)
        rows, dtype = count * self.rows_each, quant_format.storage_dtype
        width = quant_format.row_bytes(in_features) // dtype.itemsize
        self.packed = frozen(torch.empty(rows, width, dtype=dtype, device=device))
        self.absmax = frozen(
            torch.empty(rows, quant_format.row_statistics, dtype=quant_format.absmax_dtype, device=device)
        )
        self.nested = None
        offset = None
        if quant_format.double_quant:
            self.nested = frozen(torch.empty(rows, 1, dtype=torch.int32, device=device))
            offset = torch.empty(count, dtype=torch.float32, device=device)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("dense", None, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of each matrix."""
        return self.out_features, self.in_features

    @property
    def numel(self) -> int:
        """Number of weights in each matrix."""
        return self.out_features * self.in_features

    def matrix(self, index: int = 0) -> Matrix:
        """Return matrix ``index`` from the parameters as they are now (inside an FSDP forward: gathered)."""
        return self.stack().matrix(index)

    def stack(self) -> Stack:
        """Return all matrices, from the parameters as they are now."""
        quantized = QuantizedTensor(self.packed, self.absmax, self.nested, self.offset)  # type: ignore[arg-type]
        return Stack(self.count, self.out_features, self.in_features, quantized, self.quant_format)

    def dequantize(self, dtype: torch.dtype, index: int = 0) -> torch.Tensor:
        """Return matrix ``index``, ``[out_features, in_features]`` in ``dtype``."""
        with torch.no_grad():
            return self.matrix(index).whole(dtype)

    def matmul(self, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Return ``x @ matrix.T``: ``[..., in_features]`` -> ``[..., out_features]``."""
        return multiply(x, [self.for_product(x, index)])[0]

    def for_product(self, x: torch.Tensor, index: int = 0) -> Matrix:
        """Return the matrix to pass to `multiply`: dense if it is kept, or if backward should reuse it."""
        if isinstance(self.dense, torch.Tensor) and self.dense.dtype == x.dtype:
            return Matrix(self.out_features, self.in_features, None, self.quant_format, self.dense[index])
        matrix = self.matrix(index)
        return densify(matrix, x.dtype) if self._caches and self.training and torch.is_grad_enabled() else matrix

    def stack_for_product(self, dtype: torch.dtype) -> Stack:
        """Return the matrices for `grouped_product`: dense if they are kept, or if backward should reuse them."""
        if isinstance(self.dense, torch.Tensor) and self.dense.dtype == dtype:
            return Stack(self.count, self.out_features, self.in_features, None, self.quant_format, self.dense)
        stack = self.stack()
        return densify_stack(stack, dtype) if self._caches and self.training and torch.is_grad_enabled() else stack

    @property
    def _caches(self) -> bool:
        return self.cache_dequantized and self.quant_format.dense_forward and self.numel <= WHOLE_WEIGHTS

    @torch.no_grad()
    def keep_dense(self, dtype: torch.dtype) -> None:
        """Keep the matrices dequantized to ``dtype`` from now on, with ``cache_dequantized``; only if unsharded.

        They are frozen, so that a copy made once loading is done stays true.
        """
        if self._caches:
            self.dense = self.stack().whole(0, self.count, dtype)

    @torch.no_grad()
    def fill(self, quantized: QuantizedTensor) -> None:
        """Write ``quantized``, this rank's rows (all rows if nothing is sharded), into the parameters."""
        for name in ("packed", *STATISTICS):
            value, parameter = getattr(quantized, name), getattr(self, name)
            if parameter is not None:
                local_tensor(parameter).copy_(value)
        if isinstance(self.offset, torch.Tensor) and quantized.offset is not None:
            self.offset.copy_(quantized.offset)

    def extra_repr(self) -> str:
        """Show shape and format."""
        kind = f"{self.quant_format.name}{'+dq' if self.quant_format.double_quant else ''}"
        many = f"count={self.count}, " if self.count > 1 else ""
        if self.quant_format.block_size != BLOCK_WEIGHTS:
            kind += f", block_size={self.quant_format.block_size}"
        if self.quant_format.threshold:
            kind += f", threshold={self.quant_format.threshold:g}"
        return f"{many}in_features={self.in_features}, out_features={self.out_features}, {kind}"


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """Return a parameter that is never trained."""
    return nn.Parameter(tensor, requires_grad=False)
