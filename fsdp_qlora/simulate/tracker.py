"""torch's memory tracker around a training step on fake or real tensors, and simulated ranks.

This is the only module that uses these private parts of torch: `FakeTensorMode`, the ``fake`` process group,
`FSDPMemTracker`, and FSDP's own hooks for units of two modules (tied embedding and head), which `FSDPMemTracker`
mistakes for two units. `tests/unit/test_simulate.py` fails if they change.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType, _SavedFSDPMethods
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, _register_group_forward_hooks
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fsdp_qlora.distributed.mesh import Ranks, build_mesh
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.errors import PlanError, typed_line
from fsdp_qlora.simulate.stand_ins import OUR_OPS

T = TypeVar("T")


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of the tensors that one rank holds at one moment, by purpose."""

    parameters: int = 0
    """This rank's shards of all parameters and statistics, and the buffers."""
    gradients: int = 0
    optimizer: int = 0
    """The optimizer's state, and temporaries of the update."""
    activations: int = 0
    """Activations, logits, dequantized weights and temporaries of backward."""
    gather: int = 0
    """Gathered units, and the buffers they are received in."""

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(asdict(self).values())

    def plus(self, other: TensorBytes, times: float = 1) -> TensorBytes:
        """Return the sum of this and ``times`` the other, kind by kind."""
        values = {f.name: round(getattr(self, f.name) + times * getattr(other, f.name)) for f in fields(self)}
        return TensorBytes(**values)


_KINDS = {
    _FSDPRefType.SHARDED_PARAM: "parameters",
    _FSDPRefType.BUFFER: "parameters",
    _FSDPRefType.SHARDED_GRAD: "gradients",
    _FSDPRefType.UNSHARDED_GRAD: "gradients",
    _FSDPRefType.REDUCE_SCATTER: "gradients",
    _FSDPRefType.OPT: "optimizer",
    _FSDPRefType.ACT: "activations",
    _FSDPRefType.TEMP: "activations",
    _FSDPRefType.INP: "activations",
    _FSDPRefType.UNSHARDED_PARAM: "gather",
    _FSDPRefType.ALL_GATHER: "gather",
}

NOT_COUNTED = torch.device("meta")
"""Device of simulated host memory where the simulated device is a CPU, so that it is not counted as the device's."""

Place = tuple[str, nn.Module | None]
"""``("forward" | "backward", the unit that started last)``, or ``("update", None)``."""


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of tensors at each place in a step."""

    device: dict[Place, TensorBytes]
    host: dict[Place, TensorBytes]
    """Of tensors in host memory, if the device is an accelerator; else empty, since the device's memory is the host's.
    """


class _PlaceTracker(FSDPMemTracker):
    """torch's tracker, recording the peak at each place in the step; a place lasts until the next one begins."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, units: Iterable[nn.Module], device_type: str
    ) -> None:
        super().__init__(model, optimizer)
        self._unsharded_units = [unit for unit in units if not isinstance(unit, FSDPModule)]
        self.place: Place = ("forward", model)
        self._device_type = device_type
        kinds = {device_type, HOST.type}
        self.peaks: dict[str, dict[Place, dict[Any, int]]] = {kind: {} for kind in kinds}
        """By type of device, then by place."""
        self._highest: dict[tuple[str, Place], int] = {}
        self._whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
        self._hooks: list[RemovableHandle] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Half of all calls ask a fake tensor for its device; dispatching it through both modes costs as much as an op.
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if (body := OUR_OPS.get(func)) is not None:  # an op of ours: its own allocations count too
            with self:
                return body(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Update the peak of the current place only: torch's version visits every module after every operation."""
        for device, snapshot in self._curr_mem_snap.items():
            if (peaks := self.peaks.get(device.type)) is None:
                continue
            total = snapshot["Total"]
            if total > self._highest.get((device.type, self.place), -1):
                self._highest[device.type, self.place] = total
                peaks[self.place] = {kind: count for kind, count in snapshot.items() if kind in _KINDS}

    def _fsdp_state_pre_forward(self, fsdp_mod: FSDPModule, orig_fsdp_state_pre_fw: Callable[..., T]) -> Any:
        inner = super()._fsdp_state_pre_forward(fsdp_mod, orig_fsdp_state_pre_fw)  # type: ignore[arg-type]

        @wraps(orig_fsdp_state_pre_fw)
        def begin(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._mod_tracker.is_bw:  # otherwise it is recomputation within backward
                self.place = ("forward", module)
            return inner(module, *args, **kwargs)

        return begin

    def _fsdp_param_group_pre_backward(self, fsdp_mod: FSDPModule, orig_fsdp_param_group_pre_backward: Any) -> Any:
        inner = super()._fsdp_param_group_pre_backward(fsdp_mod, orig_fsdp_param_group_pre_backward)

        @wraps(orig_fsdp_param_group_pre_backward)
        def begin(*args: Any, **kwargs: Any) -> None:
            self.place = ("backward", fsdp_mod)  # type: ignore[assignment]
            inner(*args, **kwargs)

        return begin

    def _instrument_fsdp_module(self) -> None:
        """As in torch, but once per unit: a unit of two modules stays gathered from the first to the second."""
        for state in _states(self._root_mod):
            group, module = state._fsdp_param_group, state._modules[0]
            if group is None:
                continue
            self._instrument_fsdp_sharded_params_grads(group)
            before = self._fsdp_state_pre_forward(module, state._pre_forward)  # type: ignore[arg-type]
            after = self._fsdp_state_post_forward(module, state._post_forward)  # type: ignore[arg-type]
            _register(state, before, after)
            if module is self._root_mod:
                self._instrument_methods(state, before, after)
            self._fsdp_mod_to_saved_methods[module] = _SavedFSDPMethods(group.pre_backward, group.post_backward)
            group.pre_backward = self._fsdp_param_group_pre_backward(module, group.pre_backward)  # type: ignore
            group.post_backward = self._fsdp_param_group_post_backward(module, group.post_backward)  # type: ignore
        for buffer in self._root_mod.buffers():
            self._update_and_maybe_create_winfos(buffer, _FSDPRefType.BUFFER)
        self._instrument_whole_parameters()
        for unit in self._unsharded_units:
            self._hooks.append(unit.register_forward_pre_hook(self._forward_of, prepend=True))
            self._hooks.append(unit.register_full_backward_pre_hook(self._backward_of, prepend=True))

    def _instrument_methods(self, state: FSDPState, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Track what FSDP takes for a forward of the root beside its forward (`register_fsdp_forward_method`).

        Such methods ask the root's state directly, without hooks, which torch's tracker does not see.
        """
        self._mod_tracker._get_mod_name(self._root_mod)  # the names of all modules, else learned in the root's hooks

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.reset_mod_stats()  # an objective may run the model several times
            return before(*args, **kwargs)

        state._pre_forward, state._post_forward = begin, after  # type: ignore[method-assign]

    def _forward_of(self, unit: nn.Module, _: Any) -> None:
        if not self._mod_tracker.is_bw:  # otherwise it is recomputation within backward
            self.place = ("forward", unit)

    def _backward_of(self, unit: nn.Module, _: Any) -> None:
        self.place = ("backward", unit)

    def _instrument_whole_parameters(self) -> None:
        """Count the parameters that FSDP ignores, and their gradients: torch's tracker only sees FSDP's parameters."""

        def note_gradient(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._update_and_maybe_create_winfos(parameter.grad, _FSDPRefType.SHARDED_GRAD)

        for parameter in self._whole:
            self._update_and_maybe_create_winfos(parameter, _FSDPRefType.SHARDED_PARAM)
            note_gradient(parameter)
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(note_gradient))

    def _deregister_module_and_optimizer_hooks(self) -> None:
        super()._deregister_module_and_optimizer_hooks()
        while self._hooks:
            self._hooks.pop().remove()
        for state in _states(self._root_mod):
            for name in ("_pre_forward", "_post_forward"):
                vars(state).pop(name, None)  # what `_instrument_methods` has put before the class's own
            _register(state, state._pre_forward, state._post_forward)


def _states(root: nn.Module) -> list[FSDPState]:
    """Return FSDP's state for each unit under ``root``, without duplicates."""
    return list(dict.fromkeys(m._get_fsdp_state() for m in root.modules() if isinstance(m, FSDPModule)))


def _register(state: FSDPState, pre_forward: Any, post_forward: Any) -> None:
    """Install these two hooks around the unit's forward, replacing the current ones."""
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    modules: Sequence[nn.Module] = list(state._modules)
    if len(modules) > 1:
        handle = _register_group_forward_hooks(
            state._modules, pre_forward, post_forward, state._modules_to_run_forward, state._cast_output_dtype
        )
        state._pre_forward_hook_handle = state._post_forward_hook_handle = handle
        return
    state._pre_forward_hook_handle = modules[0].register_forward_pre_hook(pre_forward, prepend=True, with_kwargs=True)
    state._post_forward_hook_handle = modules[0].register_forward_hook(post_forward, prepend=False)


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward_backward: Callable[[Callable[[], None]], object],
    update: Callable[[], object],
    fake: FakeTensorMode | None = None,
    units: Iterable[nn.Module] = (),
    device_type: str = "cpu",
) -> Peaks:
    """Run one step and return the peak tensor bytes at each place.

    Args:
        model: the root FSDP module.
        optimizer: the optimizer; its state should already exist, as in every step but the first.
        forward_backward: runs the micro-batches; calls its argument before each one.
        update: changes the parameters. It runs outside ``fake``, because optimizers read their step counters.
        fake: the mode of the model's fake tensors; None for real ones.
        units: the modules that name the places, where FSDP does not shard them.
        device_type: where the step runs; if that is an accelerator, tensors in host memory are counted apart.

    Raises:
        PlanError: if the model's own code reads values, which fake tensors do not have, or fails without them.
    """
    tracker = _PlaceTracker(model, optimizer, units, device_type)
    mode: AbstractContextManager[object] = fake or nullcontext()
    on_accelerator = device_type != HOST.type
    # Backward in this thread, as on a CPU: with a simulated device autograd would start a thread for it, and that
    # thread would abort the process when it exits.
    with mode, tracker, torch.autograd.set_multithreading_enabled(False):
        try:
            forward_backward(tracker.reset_mod_stats)
        except DataDependentOutputException as error:
            raise PlanError(
                "plan.simulate: the model's own code reads values of its tensors, which a simulated step has not; set "
                "it to false, and the plan counts them."
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:  # upstream's code
            raise PlanError(
                f"plan.simulate: a step of this model cannot be computed without values ({typed_line(error)}); set it "
                "to false, and the plan counts it."
            ) from error
    tracker.place = ("update", None)
    with tracker:
        update()
    peaks = {kind: {place: _by_kind(peak) for place, peak in places.items()} for kind, places in tracker.peaks.items()}
    return Peaks(peaks[device_type], peaks[HOST.type] if on_accelerator else {})


def _by_kind(snapshot: dict[Any, int]) -> TensorBytes:
    found = TensorBytes()
    for kind, count in snapshot.items():
        found = found.plus(TensorBytes(**{_KINDS[kind]: count}))
    return found


def fake_mode() -> FakeTensorMode:
    """Return a mode under which tensors have shapes, dtypes and devices, but no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def simulated_ranks(
    world_size: int, shard_degree: int = 0, replicate_degree: int = 1, device: torch.device = HOST
) -> Iterator[Ranks]:
    """Act as rank 0 (the fullest) of ``world_size`` simulated ranks on ``device``, whose collectives do nothing.

    Raises:
        PlanError: if this process already has a process group.
    """
    if dist.is_initialized():
        raise PlanError("plan.simulate: this process already has a process group; simulate in a separate process.")
    dist.init_process_group("fake", rank=0, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield Ranks(build_mesh(device, shard_degree, replicate_degree, world_size), group, group, device)
    finally:
        dist.destroy_process_group()
        gc.collect()  # modules, hooks and mesh refer to each other
