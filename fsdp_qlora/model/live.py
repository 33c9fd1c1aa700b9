"""Counts the bytes of tensors on meta while operations run, by torch's dispatch modes.

This is the only module of `model` that uses these private parts of torch; `tests/unit/test_runs.py` fails if they
change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_FLASH_SIZE = 256
"""Largest head that flash attention supports."""


def leaves_of(value: Any) -> list[Any]:
    """Return everything in nested containers, in order."""
    return tree_leaves(value)


def with_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return nested containers with every tensor changed."""
    return tree_map_only(torch.Tensor, change, value)


def backward_peak(forward: Callable[[], Any], leaves: list[torch.Tensor]) -> int:
    """Return the most bytes in a backward beyond those that there are after the forward."""
    live = _Live()
    with torch.enable_grad(), live:
        out = [x for x in leaves_of(forward()) if isinstance(x, torch.Tensor) and x.requires_grad]
        before = live.peak = live.now
        torch.autograd.grad(out, leaves, [torch.empty_like(x) for x in out], allow_unused=True)
    return live.peak - before


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in leaves_of(out):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._known:
                self._known.add(id(storage))  # a storage is one object for as long as a tensor is on it
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


class _Kernel(torch.autograd.Function):
    """Attention as one kernel, which keeps its inputs, its output and a number for each query."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        if mask is None and query.shape[-1] == value.shape[-1]:  # flash attention lays its output out as the query
            out = torch.empty_like(query)
        else:
            out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        bias = () if mask is None else (query.new_empty(mask.shape),)  # in the query's dtype, made in each call
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32), *bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


class OneKernel(TorchFunctionMode):
    """Computes attention, and on an accelerator dropout, as one kernel where a device has one; meta has none.

    Args:
        on_accelerator: whether masks of dropout are bytes; on a CPU they are factors in the input's dtype.
    """

    def __init__(self, on_accelerator: bool = False) -> None:
        super().__init__()
        self._on_accelerator = on_accelerator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func is F.dropout and self._on_accelerator:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    own: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    flash = attn_mask is None and query.dtype.itemsize == 2 and query.shape[-1] <= _FLASH_SIZE
    if not flash and key.shape[1] != query.shape[1]:  # heads in groups: by single operations
        return own(query, key, value, attn_mask, *args, **kwargs)
    return _Kernel.apply(query, key, value, attn_mask)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x
