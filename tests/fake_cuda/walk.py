"""Walks the life of a run on the fake device: build, load, and what follows (`life.py`).

The order is that of `fsdp_qlora.run.build.load_model`; files are replaced by a
source of fake tensors, and the process group is torch's ``fake`` one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers.masking_utils
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from fsdp_qlora.adapters import peft_method
from fsdp_qlora.adapters.lora import initialize_adapters
from fsdp_qlora.attention import blockwise, varlen
from fsdp_qlora.config.auto import degree
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks, build_mesh, host_mesh
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.load.safetensors import StoredTensor
from fsdp_qlora.load.stream import stream_weights
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.parallel.shard import host_modules, model_dtype
from fsdp_qlora.quant import products
from fsdp_qlora.quant.formats import format as formats
from fsdp_qlora.quant.swap import keep_dense
from fsdp_qlora.run.build import build_sharded
from fsdp_qlora.run.decide import planned
from tests.fake_cuda import triton_kernels
from tests.fake_cuda.device import observed
from tests.fake_cuda.life import answers, batch_of, live
from tests.fake_cuda.recorder import Recorder
from tests.fake_cuda.variant import Variant, config_of

BODIES = {**products.BODIES, **blockwise.BODIES, **varlen.BODIES}


class FakeFolder:
    """Stands for the model's files: every tensor is there, of the right shape, in bfloat16."""

    entries: dict[str, Any] = {}  # noqa: RUF012 - read only
    folder = Path("fake")
    bytes_read = total_bytes = 0

    def has(self, name: str) -> bool:
        """Return False: no buffer is stored."""
        return False

    def find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Return a tensor of that shape."""
        return StoredTensor(name, shape, (mock.Mock(file=Path("fake")),))

    def read(self, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Return these elements, in host memory."""
        return torch.empty(stop - start, dtype=torch.bfloat16)


@contextlib.contextmanager
def _ranks(variant: Variant, config: RunConfig) -> Iterator[Ranks]:
    dist.init_process_group("fake", rank=0, world_size=variant.world_size)
    try:
        group, device, fsdp = dist.group.WORLD, torch.device("cuda", 0), config.fsdp
        assert group is not None
        mesh = build_mesh(device, degree(fsdp.shard_degree) or 0, fsdp.replicate_degree, variant.world_size)
        yield Ranks(mesh, group, group, device)
    finally:
        dist.destroy_process_group()


class _InMode:
    """torch, except that ``empty`` runs under the fake mode: FSDP makes a tensor while no mode is active."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return ``torch.empty`` as a fake tensor."""
        with self._mode:
            return torch.empty(*args, **kwargs)


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` outside all modes: PEFT's constructors move a linear from meta, which a fake one refuses."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return real


@contextlib.contextmanager
def _stand_ins(mode: FakeTensorMode) -> Iterator[None]:
    """Replace what reads values or escapes the fake mode."""
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (formats, "_dynamic_map", lambda device: torch.empty(256, device=device)),
            (transformers.masking_utils, "is_tracing", lambda *_, **__: False),
            (_fsdp_param_group, "torch", _InMode(mode)),
            (peft_method, "layers_alone", _outside(peft_method.layers_alone)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        warnings.simplefilter("ignore")
        yield


def _fake_buffers(mode: FakeTensorMode, base: nn.Module) -> None:
    """Make the buffers fake, where they are: FSDP moves them to the device."""
    with mode:
        for module in base.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer))


def walk(folder: Path, variant: Variant) -> Recorder:
    """Walk one variant; return what was recorded in each phase: load, steps, evaluate, generate, save, export."""
    config = config_of(folder, variant)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    recorder = Recorder(BODIES, answers(variant))
    with _ranks(variant, config) as ranks:
        host_mesh(ranks.mesh)  # which keeps it: a mesh cannot be made where its own tensors are fake
        resolved, base, plan = planned(config, variant.world_size)
        shapes = read_shapes(base)
        batches = [batch_of(variant, shapes.vocab_size) for _ in variant.steps]
        with _stand_ins(mode), observed(recorder.note_sync), contextlib.ExitStack() as modes:
            model = build_sharded(resolved, base, shapes, plan, ranks, before_sharding=partial(_fake_buffers, mode))
            modes.enter_context(torch.compiler.set_stance("default", force_backend=variant.backend))
            if triton_kernels.asked_for(variant.settings):
                modes.enter_context(triton_kernels.stand_in(recorder.launched))
            modes.enter_context(mode)
            modes.enter_context(recorder)
            with recorder.in_phase("load"):
                shards_on = HOST if resolved.fsdp.offloads_parameters else ranks.device
                on_host = host_modules(model.base, plan.offloaded)
                stream_weights(model, model.base, FakeFolder(), ranks, None, shards_on, on_host)  # type: ignore[arg-type]
                initialize_adapters(model, 0, ranks.shard_rank, ranks.shard_size, resolved.lora)
                if plan.settings.keeps_dense:
                    keep_dense(base, model_dtype(resolved.precision.name))
            live(model, resolved, plan.targets, batches, variant, ranks, recorder, folder)
    return recorder
