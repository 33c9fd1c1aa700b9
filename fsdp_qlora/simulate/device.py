"""A simulated accelerator: a device type of torch's (PrivateUse1) on which every tensor is fake.

It compiles and patches nothing: torch lets Python register a device type and kernels for it. Ours are two functions
that allocate, and return fake tensors, and one that chooses an attention kernel as CUDA does. All else is what
`FakeTensorMode` knows about every device. Host memory is then really ``cpu``, and mixing the two is an error as on a
GPU.

Registering cannot be undone. From then on torch takes this device for the machine's accelerator
(`torch.accelerator`, and the streams of autograd on a GPU), so a process that has registered it must not train
afterwards: `fsdp_qlora.simulate.apart` gives it a process of its own.

This is the only module that uses these private parts of torch; `tests/unit/test_simulated_device.py` fails if they
change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakIdKeyDictionary

from fsdp_qlora.errors import PlanError

NAME = "simulated"
"""The device type, as in ``torch.device("simulated")``."""
MASK_COLUMNS = 8
"""CUDA pads an attention mask to a multiple of this many columns."""
ONE_KERNEL = ("silu_backward", "mish_backward")
"""Operations that are one kernel on every real device, and several with temporaries where none is registered."""
_FLASH_SIZE = 256
"""Largest head that flash attention supports."""


class Event(torch.Event):
    """An event of the simulated device: nothing is ever pending."""

    def synchronize(self) -> None:
        """Return at once; torch's own events raise an error on a device registered from Python."""


class Stream(torch.Stream):
    """A stream of the simulated device, whose events are `Event`."""

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        """Record ``event``, or a new one, and return it."""
        event = event or Event(self.device)
        event.record(self)
        return event


class _Mode(FakeTensorMode):
    """The fake mode, with pinned memory: torch's raises an error for ``pin_memory`` on a fake tensor."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._pinned = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._pin_memory.default:  # a copy, which takes as many bytes
            pinned = torch.empty_like(args[0])
            self._pinned[pinned.untyped_storage()] = True
            return pinned
        if func is torch.ops.aten.is_pinned.default:
            return args[0].untyped_storage() in self._pinned
        return super().__torch_dispatch__(func, types, args, kwargs)


def accelerator() -> torch.device:
    """Return the simulated device, registering it if this process has not done so yet."""
    accelerator_mode()
    return torch.device(NAME, 0)


@cache
def accelerator_mode() -> FakeTensorMode:
    """Register the simulated device in this process, and return the mode that its tensors belong to.

    There is one mode for the whole process: tables that are kept per device (`fsdp_qlora.quant.formats`) are then fake
    tensors of the same mode in every simulation.

    Raises:
        PlanError: if another device type has been registered already.
    """
    mode = _Mode()
    module = ModuleType(f"torch.{NAME}")
    always: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda _=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "_is_in_bad_fork": lambda: False,
        "stream": lambda stream: stream,  # a stream is its own context
        "Stream": Stream,
        "Event": Event,
    }
    for name, value in always.items():
        setattr(module, name, value)
    try:
        _setup_privateuseone_for_python_backend(NAME, module)
    except RuntimeError as error:
        raise PlanError(
            f"plan.simulate: another device type is registered in this process ({error}); simulate without it."
        ) from error
    current = Stream()
    module.current_stream = lambda _=None: current  # type: ignore[attr-defined]
    _register_kernels(mode)
    return mode


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Compute ``scaled_dot_product_attention`` by the kernel that CUDA chooses: flash, efficient, or plain operations.

    torch's own choice for a device registered from Python is plain operations, which keep all scores. Flash attention
    takes 16 bits, equal sizes of keys and values and no mask; efficient attention takes any of these but no grouped
    heads (https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).

    Args:
        query: ``[batch, heads, queries, size]``.
        key: ``[batch, key heads, keys, size]``.
        value: ``[batch, key heads, keys, value size]``.
        attn_mask: bool or of the query's dtype, broadcastable to ``[batch, heads, queries, keys]``.
        dropout_p: probability of dropping a score.
        is_causal: whether a query sees no later key.
        scale: factor on the scores; None = ``size ** -0.5``.
        enable_gqa: whether there may be fewer key heads than heads.

    Returns:
        ``[batch, heads, queries, value size]``, in the query's dtype.
    """
    ops, size = torch.ops.aten, query.shape[-1]
    if attn_mask is None and query.dtype.itemsize == 2 and size == value.shape[-1] <= _FLASH_SIZE:
        return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa and query.shape[1] != key.shape[1]:
        return ops._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return ops._scaled_dot_product_efficient_attention(
        query, key, value, bias, grad, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the mask in the query's dtype, with padded columns, as CUDA makes one in each call."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if missing := -mask.shape[-1] % MASK_COLUMNS:
        mask = torch.nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _register_kernels(mode: FakeTensorMode) -> None:
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
        with mode:
            return torch.empty(size, dtype=dtype, device=device)

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
        with mode:
            return torch.empty_strided(size, stride, dtype=dtype, device=device)

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    for name in ONE_KERNEL:  # never called: a fake tensor's own dispatch comes first
        library.impl(name, lambda grad, *_: torch.empty_like(grad), "PrivateUse1")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []
"""Kernels are registered as long as their library lives."""
