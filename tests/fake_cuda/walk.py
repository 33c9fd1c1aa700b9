"""Walks the life of a run on the fake device: build, load, train two steps, evaluate, gather what is saved and exported.

The order is that of `fsdp_qlora.run.build.load_model` and `fsdp_qlora.run.training.Training`; files are replaced by a
source of fake tensors, and the process group is torch's ``fake`` one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from transformers import AutoConfig

from fsdp_qlora.adapters.lora import initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.attention import blockwise, varlen
from fsdp_qlora.checkpoint.contents import checkpoint_tensors
from fsdp_qlora.checks.gradients import FirstGradients
from fsdp_qlora.config.auto import degree
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.data.labels import ROWS, TOKENS
from fsdp_qlora.data.loader import Batch, MicroBatch, Piece
from fsdp_qlora.data.pack import flat_batch, pack
from fsdp_qlora.distributed.mesh import Ranks, build_mesh, host_mesh
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.export.adapter import gather_adapter
from fsdp_qlora.load.safetensors import StoredTensor
from fsdp_qlora.load.stream import stream_weights
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.shard import host_modules, model_dtype, synchronize_gradients
from fsdp_qlora.quant import products
from fsdp_qlora.quant.formats import format as formats
from fsdp_qlora.quant.swap import keep_dense
from fsdp_qlora.run.build import build_sharded
from fsdp_qlora.run.decide import planned
from fsdp_qlora.train.evaluate import evaluate
from fsdp_qlora.train.step import StepSettings, train_step
from tests.fake_cuda.device import observed
from tests.fake_cuda.faults import PLANTS
from tests.fake_cuda.recorder import Recorder

BODIES = {**products.BODIES, **blockwise.BODIES, **varlen.BODIES}
LENGTH = 48
STEPS = 3
"""The first makes the optimizer's state, the first two check gradients, and the third is like all later ones."""


@dataclass(frozen=True)
class Variant:
    """Settings of a walk; those left out are the defaults of a run."""

    family: str = "llama"
    world_size: int = 2
    batch: str = "padded"
    """``padded``, ``packed`` (rows share sequences), or ``flat`` (one row for varlen attention)."""
    rows: int = 1
    """Rows of a micro-batch."""
    accumulation: int = 2
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    plant: str | None = None
    """Name of a fault to plant, in `PLANTS`."""


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


def _config(folder: Path, variant: Variant) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder)},
        "plan": {"gpu": "80GiB"},
        "data": {"max_length": LENGTH, "packing": variant.batch != "padded"},
        "lora": {"r": 16, "dropout": 0.0},
        "train": {
            "global_batch_size": variant.rows * variant.accumulation * variant.world_size,
            "micro_batch_size": variant.rows,
            "activation_checkpointing": "none",
            "compile": "false",
        },
    }
    for group, settings in variant.settings.items():
        values[group] = {**values.get(group, {}), **settings}
    return from_dict(values)


def _micro_batch(variant: Variant, number: int, vocabulary: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(number)

    def row(length: int) -> Piece:
        return torch.randint(1, vocabulary, (length,), generator=generator), torch.ones(length, dtype=torch.bool)

    numbers = tuple(range(variant.rows))
    if variant.batch == "padded":
        ids = torch.stack([row(LENGTH)[0] for _ in numbers])
        return MicroBatch(number, ids, ids.clone(), rows=numbers)
    third = LENGTH // 3
    sequences = [[row(third), row(third), row(LENGTH - 2 * third)] for _ in numbers]
    if variant.batch == "packed":
        return pack(sequences, number, numbers)
    return flat_batch(sequences, LENGTH, 1, True, number, numbers)


def _batch(variant: Variant, vocabulary: int) -> Batch:
    micro_batches = [_micro_batch(variant, number, vocabulary) for number in range(variant.accumulation)]
    rows = variant.rows * variant.accumulation * variant.world_size
    targets = sum(m.supervised.numel() for m in micro_batches) * variant.world_size
    return Batch(micro_batches, rows, targets, {TOKENS: targets, ROWS: rows})


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


@contextlib.contextmanager
def _stand_ins(mode: FakeTensorMode) -> Iterator[None]:
    """Replace what reads values or escapes the fake mode."""
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (formats, "_dynamic_map", lambda device: torch.empty(256, device=device)),
            (transformers.masking_utils, "is_tracing", lambda *_, **__: False),
            (_fsdp_param_group, "torch", _InMode(mode)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        warnings.simplefilter("ignore")
        yield


def _fake_buffers(base: nn.Module, mode: FakeTensorMode) -> None:
    """Make the buffers fake, where they are: FSDP moves them to the device."""
    with mode:
        for module in base.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer))


def walk(folder: Path, variant: Variant) -> Recorder:
    """Walk one variant; return what was recorded in each phase: load, step 1 to 3, evaluate, save, export."""
    config = _config(folder, variant)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    packed = variant.batch == "packed"
    # Values that upstream's code and ours branch on: no rank failed, whether rows are packed, evenly spread experts.
    each = 2 * LENGTH * variant.rows // 4
    answers = {"all_max": 0.0, "find_packed_sequence_indices": not packed, "_tokens_per_expert": each}
    recorder = Recorder(BODIES, answers)
    with _ranks(variant, config) as ranks:
        host_mesh(ranks.mesh)  # which keeps it: a mesh cannot be made where its own tensors are fake
        resolved, base, plan = planned(config, variant.world_size)
        resolved = replace(resolved, train=replace(resolved.train, compile="false"))
        shapes = read_shapes(base)
        batches = [_batch(variant, shapes.vocab_size) for _ in range(STEPS)]
        with _stand_ins(mode), observed(recorder.note_sync), contextlib.ExitStack() as modes:
            _fake_buffers(base, mode)
            model = build_sharded(resolved, base, shapes, plan, ranks)
            modes.enter_context(mode)
            modes.enter_context(recorder)
            with recorder.in_phase("load"):
                shards_on = HOST if resolved.fsdp.offloads_parameters else ranks.device
                on_host = host_modules(model.base, plan.offloaded)
                stream_weights(model, model.base, FakeFolder(), ranks, None, shards_on, on_host)  # type: ignore[arg-type]
                initialize_adapters(model, 0, ranks.shard_rank, ranks.shard_size, resolved.lora)
                if plan.settings.keeps_dense:
                    keep_dense(base, model_dtype(resolved.precision.name))
            if variant.plant is not None:
                PLANTS[variant.plant](model.base)
            _train(model, resolved, batches, ranks, recorder)
    return recorder


def _train(model: CausalModel, config: RunConfig, batches: list[Batch], ranks: Ranks, recorder: Recorder) -> None:
    optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
    objective = build_objective(config.objective.name)
    settings = StepSettings(
        objective=objective, ranks=ranks, seed=0, max_grad_norm=1.0, synchronize=synchronize_gradients,
        around=contextlib.nullcontext, reduce=ReplicatedGradients(optimizer.parameters.items(), ranks),
        checks=(FirstGradients(model, ranks),),
    )  # fmt: skip
    model.train()
    with torch.autograd.set_multithreading_enabled(False):
        batches = [
            replace(b, micro_batches=[m.pinned() for m in b.micro_batches]) for b in batches
        ]  # as the loader does
        for step, batch in enumerate(batches, start=1):
            with recorder.in_phase(f"step {step}"):
                train_step(model, batch, optimizer, 1e-4, step, False, settings)
        with recorder.in_phase("evaluate"):
            batch = batches[0]
            evaluate(model, batch.micro_batches, objective, batch.weights, ranks)
        with recorder.in_phase("save"):
            checkpoint_tensors(trainable_parameters(model), optimizer)
        with recorder.in_phase("export"):
            gather_adapter(model)


TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "experts": {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_folder(root: Path, family: str) -> Path:
    """Write the config of a small model; it has no weights."""
    folder = root / family
    settings = TINY | FAMILIES[family]
    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
    return folder
