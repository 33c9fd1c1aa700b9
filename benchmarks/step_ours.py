"""Our own way to train: as `fsdp-qlora train` does it, `prepare` and then `train_step`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.step_rows import Rows
from benchmarks.step_spec import Known, Spec, Stepper, plain_loop
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.distributed.process import Placement


def config_of(spec: Spec, length: int, num_ranks: int) -> RunConfig:
    """Return the settings of a spec whose rows have ``length`` tokens."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": spec.model},
        "data": {"max_length": length},
        "lora": {"r": spec.r, "alpha": 2 * spec.r},
        "optim": {"lr": 2e-4},
        "train": {
            "activation_checkpointing": "full" if spec.checkpointing else "none",
            "global_batch_size": spec.batch * num_ranks, "micro_batch_size": spec.batch, "max_steps": 1000,
        },
    }  # fmt: skip
    for group, settings in spec.overrides.items():
        values[group] = {**values.get(group, {}), **settings}
    return from_dict(values)


@contextlib.contextmanager
def ours(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Train as `fsdp-qlora train` does: `prepare`, then `train_step`."""
    from benchmarks.drawn import DrawnWeights
    from fsdp_qlora.adapters.names import trainable_parameters
    from fsdp_qlora.adapters.replicated import ReplicatedGradients
    from fsdp_qlora.load.safetensors import SafetensorsFolder
    from fsdp_qlora.objectives import build_objective
    from fsdp_qlora.optim.optimizers import ShardedOptimizer
    from fsdp_qlora.parallel.shard import synchronize_gradients
    from fsdp_qlora.run.prepare import prepare
    from fsdp_qlora.train.step import StepSettings, train_step

    config = config_of(spec, rows.length, placement.world_size)
    prepared = prepare(config, weights=DrawnWeights if spec.drawn else SafetensorsFolder)
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), config.optim)
    settings = StepSettings(
        objective=build_objective("sft"), ranks=prepared.ranks, seed=0, max_grad_norm=1.0,
        synchronize=synchronize_gradients, around=contextlib.nullcontext,
        reduce=ReplicatedGradients(optimizer.parameters.items(), prepared.ranks), fallback=_compiled(prepared),
    )  # fmt: skip
    prepared.model.train()
    batch_at = _batches(spec, rows, prepared)
    number = 0

    def step() -> None:
        nonlocal number
        batch = batch_at(number)
        number += 1
        train_step(prepared.model, batch, optimizer, 2e-4, number, False, settings)

    try:
        yield step, _known(spec, rows, prepared)
    finally:
        prepared.close()


@contextlib.contextmanager
def loop(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Train our layers on one rank in a plain loop: their forward, backward, clipping and torch's AdamW."""
    from fsdp_qlora.adapters.names import trainable_parameters
    from fsdp_qlora.data.loader import TokenBatch
    from fsdp_qlora.objectives.objective import token_losses
    from fsdp_qlora.run.prepare import prepare

    prepared = prepare(config_of(spec, rows.length, placement.world_size))
    model = prepared.model.train()
    trained = [parameter for _, parameter in trainable_parameters(model)]

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        micro_batch = TokenBatch(0, ids, labels)
        return token_losses(model, micro_batch).sum() / micro_batch.supervised.numel()

    try:
        yield plain_loop(trained, rows, spec, placement, loss), {}
    finally:
        prepared.close()


def _known(spec: Spec, rows: Rows, prepared: Any) -> Known:
    from fsdp_qlora.checks.gather import verify_gather
    from fsdp_qlora.plan.choices import smaller
    from fsdp_qlora.plan.moved import gathered_bytes
    from fsdp_qlora.plan.timing import model_flops

    plan, ranks = prepared.plan, prepared.ranks
    tokens = spec.batch * rows.length * ranks.size
    return {
        "read": prepared.load.bytes_read,
        "load_seconds": prepared.load.seconds,
        "gathered": gathered_bytes(plan.memory, plan.settings) * plan.batch.accumulation_steps,
        "gather_checked": verify_gather(prepared.model, ranks),
        "planned": plan.peak,
        "smaller": smaller(plan.memory, plan.settings),
        "step_flops": model_flops(
            plan, prepared.shapes, tokens, tokens * rows.supervised(), spec.batch * ranks.size
        ),
        "choices": {key: str(choice) for key, choice in prepared.choices.items()},
    }  # fmt: skip


def _batches(spec: Spec, rows: Rows, prepared: Any) -> Callable[[int], Any]:
    """Return what gives this rank's batch of a step; each is built once, and pinned for an accelerator, as by `train`.

    Rows made of documents are laid out as the run's attention keeps them apart.
    """
    from fsdp_qlora.attention.layout import Layout
    from fsdp_qlora.data.labels import ROWS, TOKENS
    from fsdp_qlora.data.loader import Batch, TokenBatch

    ranks, config = prepared.ranks, prepared.config
    compiled = prepared.model.compiled_layers is not None
    layout = Layout.of(config.data, config.train, prepared.settings.model.attn_implementation, compiled)
    built: dict[int, Batch] = {}

    def build(number: int) -> Batch:
        targets = sum(rows.targets(number, rank, ranks.size, spec.batch) for rank in range(ranks.size))
        if (documents := rows.documents(number, ranks.rank, ranks.size, spec.batch)) is None:
            micro_batch = TokenBatch(ranks.rank, *rows.of(number, ranks.rank, ranks.size, spec.batch))
        else:
            micro_batch = replace(layout.micro_batch(documents), number=ranks.rank)
        if ranks.device.type != "cpu":
            micro_batch = micro_batch.pinned()
        num_rows = spec.batch * ranks.size
        return Batch([micro_batch], num_rows, num_rows * rows.length, {TOKENS: targets, ROWS: num_rows})

    def batch_at(number: int) -> Batch:
        place = number * ranks.size * spec.batch % len(rows)
        if place not in built:
            built[place] = build(number)
        return built[place]

    return batch_at


def _compiled(prepared: Any) -> Any:
    """Return what ends a benchmark whose layers cannot be compiled: it would measure something else."""
    from fsdp_qlora.parallel.fallback import EagerFallback

    layers = prepared.model.compiled_layers
    return None if layers is None else EagerFallback(layers, prepared.ranks, True, lambda *_: None)
