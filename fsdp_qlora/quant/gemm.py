"""Products of 16-bit matrices, in float32 on CPUs that have no 16-bit product.

Without AVX512-BF16, AMX or the like torch multiplies bf16 matrices element by element: 5 to 25 times slower than to
convert, multiply in float32 and round the result, which is also the more accurate of the two.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` with instructions of its own."""
    if dtype != torch.bfloat16:
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # private by name: test_products.py asks, too


def _in_float32(a: Tensor) -> bool:
    # only real tensors: what is simulated is a device's work, not this CPU's
    return a.device.type == "cpu" and type(a) in (Tensor, torch.nn.Parameter) and not _has_product(a.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, in the dtype of both; matrices or batches of them."""
    if _in_float32(a):
        return torch.matmul(a.float(), b.float()).to(a.dtype)
    return torch.matmul(a, b)


def add_product(into: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Add ``alpha * a @ b`` to ``into`` ``[rows, columns]``, in place; return it."""
    if _in_float32(a):
        return into.copy_(torch.addmm(into.float(), a.float(), b.float(), alpha=alpha))
    return into.addmm_(a, b, alpha=alpha)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write ``a @ b`` into ``out``; return it."""
    if _in_float32(a):
        return out.copy_(torch.mm(a.float(), b.float()))
    return torch.mm(a, b, out=out)
