"""Counts what a walked step asks of the device: launches, host synchronisations, copies between host and device."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_cuda.device import wait_for_current
from tests.fake_cuda.order import Order

_A = torch.ops.aten
_FREE = frozenset(
    [
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "expand",
        "as_strided",
        "detach",
        "detach_",
        "alias",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "unsqueeze",
        "squeeze",
        "permute",
        "resize_",
        "set_",
        "_reshape_alias",
        "lift_fresh",
        "unbind",
        "is_pinned",
        "device",
        "chunk",
        "narrow",
        "diagonal",
        "unfold",
        "reshape",
        "flatten",
        "_local_scalar_dense",
        "result_type",
        "is_same_size",
        "record_stream",
        "sym_size",
        "sym_numel",
        "size",
        "stride",
        "numel",
        "dim",
        "is_contiguous",
        "expand_as",
        "view_as",
        "is_set_to",
    ]
)
"""Operations that start no work on the device."""
_NEW = frozenset(["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"])
"""Operations that only allocate."""
_WAITING = frozenset(
    [
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "argwhere",
    ]
)
"""Operations whose result, or its size, the host must wait for."""
_OURS = ("/fsdp_qlora/", "/transformers/", "/_fully_shard/", "/bitsandbytes/", "/torch/optim/")
_ROOT = str(Path(__file__).resolve().parents[2]) + "/"


Answer = float | bool | Callable[[torch.Tensor], float | bool]


def _device(value: object) -> str | None:
    return value.device.type if isinstance(value, torch.Tensor) else None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _frames() -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, function) of the calls on the stack, innermost first, without this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tests/fake_cuda/" not in name:
            yield name, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _here() -> str:
    """Return the line that caused an operation, and the last line of this project above it."""

    def short(found: tuple[str, int, str]) -> str:
        name, line, function = found
        return f"{name.split('site-packages/')[-1].removeprefix(_ROOT)}:{line} {function}"

    frames = list(_frames())
    known = [frame for frame in frames if any(part in frame[0] for part in _OURS)]
    mine = [frame for frame in known if "/fsdp_qlora/" in frame[0] and "site-packages" not in frame[0]]
    last = short((known or frames)[0])
    return last if not mine or short(mine[0]) == last else f"{last} <- {short(mine[0])}"


class Recorder(TorchDispatchMode):
    """Records the operations of each phase, and answers those that ask for values, which fake tensors lack.

    Args:
        bodies: the project's own ops -> the functions behind them, so that what those launch is counted.
        answers: name of a calling function -> the value that ``.item()`` returns inside it, or what chooses it.
    """

    def __init__(self, bodies: Mapping[Any, Callable[..., Any]], answers: Mapping[str, Answer]) -> None:
        super().__init__()
        self._bodies, self._answers = bodies, answers
        self.phase = "build"
        self.launches: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Phase -> operation -> how often it started work on the device."""
        self.syncs: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Phase -> ``kind @ place`` -> how often the host waited for the device."""
        self.copies: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Phase -> ``source->target, pinned or pageable @ place`` -> number of copies between host and device."""
        self.gathered: Counter[str] = Counter()
        """Phase -> bytes of all gathered units."""
        self.unwaited: list[str] = []
        """Reads of a non-blocking copy to the host before anything waited for it."""
        self.order = Order()
        self.ended = ""
        """The error with which the export ended."""
        self._in_flight: dict[int, tuple[str, torch.Tensor]] = {}
        self._read: dict[int, torch.Tensor] = {}
        self._pinned: dict[int, torch.Tensor] = {}
        self._counted: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let dynamo compile although this mode is active; it sees what the compiled code runs."""
        return True

    def note_sync(self, kind: str) -> None:
        """Note that the host waits for the device."""
        self.syncs[self.phase][f"{kind} @ {_here()}"] += 1
        self._in_flight.clear()

    @contextlib.contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Record what happens inside under ``phase``."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls; the mode would do the same at the cost of an operation
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if (body := self._bodies.get(func)) is not None:
            with self:
                return body(*args, **kwargs)
        namespace, name = func._schema.name.split("::")
        if func is _A._local_scalar_dense.default:
            return self._item(args[0])
        if name in _WAITING and _device(args[0]) == "cuda":
            self.note_sync(name)
        if name == "nonzero":
            return args[0].new_empty((4, args[0].dim()), dtype=torch.int64)
        if name == "equal":
            return True
        if name == "bincount":
            return args[0].new_empty((kwargs.get("minlength", args[2] if len(args) > 2 else 0),), dtype=torch.int64)
        if name == "scatter_add_" and not args[0].is_floating_point():
            self._counted[_storage(args[0])] = args[2].numel()
        if name == "is_pinned":
            return _storage(args[0]) in self._pinned
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        self._require_one_device(namespace, name, args, kwargs)
        self._require_waited(name, args)
        out = func(*args, **kwargs)
        if name not in _FREE and any(_device(x) == "cuda" for x in (*tree_leaves(out), *tree_leaves(args))):
            self.order.issue(func, args, kwargs, out, _here)
        elif name in _NEW:
            self.order.made(out)
        if kwargs.get("pin_memory"):
            self._pin(out)
        self._note_copy(name, args, kwargs, out)
        if name == "_allgather_base_":
            self.gathered[self.phase] += args[0].nbytes
        if name not in _FREE and any(_device(x) == "cuda" for x in (*tree_leaves(out), *tree_leaves(args))):
            self.launches[self.phase][f"{namespace}.{name}"] += 1
            self._read.clear()
        return out

    def launched(self, name: str, tensors: list[torch.Tensor]) -> None:
        """Note a kernel of Triton's; which of its tensors it writes is not known, so it may write all."""
        self.order.wrote(name, tensors, _here)
        self.launches[self.phase][f"triton.{name}"] += 1
        self._read.clear()

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned[_storage(tensor)] = tensor  # held, so that no other storage gets its number
        return tensor

    def _item(self, tensor: torch.Tensor) -> float | bool | int:
        if _device(tensor) == "cuda" and _storage(tensor) not in self._read:
            wait_for_current()
            self.note_sync("item")
            self._read[_storage(tensor)] = tensor  # ``tolist`` reads one element after the other, but waits once
        for _, _, function in itertools.islice(_frames(), 16):
            if function in self._answers:
                answer = self._answers[function]
                return answer(tensor) if callable(answer) else answer
        if (things := self._counted.get(_storage(tensor))) is not None:  # a histogram: spread them evenly
            bins, bin_ = tensor.untyped_storage().nbytes() // tensor.itemsize, tensor.storage_offset()
            return things * (bin_ + 1) // bins - things * bin_ // bins
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    def _require_one_device(self, namespace: str, name: str, args: Any, kwargs: Any) -> None:
        """Check what FakeTensorMode does not: bitsandbytes' fake kernels accept tensors of several devices."""
        if namespace == "bitsandbytes":
            devices = {_device(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                raise RuntimeError(
                    f"bitsandbytes.{name}: its tensors are on several devices, {sorted(map(str, devices))}"
                )

    def _require_waited(self, name: str, args: Any) -> None:
        """Note a read of host memory that a non-blocking copy may not have reached yet."""
        if name in _FREE or name in ("copy_", "_to_copy"):
            return
        for value in tree_leaves(args):
            if _device(value) == "cpu" and (copied := self._in_flight.get(_storage(value))):
                self.unwaited.append(f"{name} @ {_here()} reads what {copied[0]} copies")

    def _note_copy(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        if name == "_to_copy":
            source, target, blocking = args[0], out, not kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, target = args[1], args[0]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return
        if {_device(source), _device(target)} != {"cpu", "cuda"}:
            return
        if _device(source) == "cpu":
            self.order.copied(self.phase, source.nbytes)
        host = source if _device(source) == "cpu" else target
        pinned = "pinned" if _storage(host) in self._pinned else "pageable"
        where = "to the host" if host is target else "to the device"
        self.copies[self.phase][f"{where}, {pinned}{', blocking' if blocking else ''} @ {_here()}"] += 1
        if blocking:
            wait_for_current()
        if host is target and blocking:
            self.note_sync("copy to the host")
        elif host is target:
            self._in_flight[_storage(target)] = (_here(), target)
        elif blocking:
            self.note_sync("blocking copy to the device")
