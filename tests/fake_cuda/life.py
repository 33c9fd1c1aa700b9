"""What a walked run does once it is built: steps, evaluation, generation, and what it saves and exports.

The order is that of `fsdp_qlora.run.training.Training`. A fake tensor has no bytes, so two ways end early:

- A save ends with the tensors that go into it. torch's stager copies storages, not tensors (`StateDictStager`), and with
  fake ones the interpreter crashes later, at the next garbage collection.
- An export ends where safetensors asks for the bytes.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.checkpoint.contents import checkpoint_tensors
from fsdp_qlora.checks.gradients import FirstGradients
from fsdp_qlora.config.schema import GenerateSettings, RunConfig
from fsdp_qlora.data.labels import ROWS, TOKENS
from fsdp_qlora.data.loader import Batch, Piece, TokenBatch
from fsdp_qlora.data.pack import flat_batch, pack
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ConfigError, StorageError
from fsdp_qlora.export.adapter import export_adapter, gather_adapter
from fsdp_qlora.inference.end_of_turn import EndOfTurn
from fsdp_qlora.inference.generate import answer
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.fallback import EagerFallback
from fsdp_qlora.parallel.shard import synchronize_gradients
from fsdp_qlora.train.evaluate import evaluate
from fsdp_qlora.train.step import StepSettings, train_step
from tests.fake_cuda.faults import PLANTS
from tests.fake_cuda.recorder import Answer, Recorder
from tests.fake_cuda.variant import LENGTH, Variant

NEW_TOKENS = 2
"""Tokens of an answer: the first from the prompt, the second from the cache."""


def _micro_batch(variant: Variant, number: int, vocabulary: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(number)

    def row(length: int) -> Piece:
        return torch.randint(1, vocabulary, (length,), generator=generator), torch.ones(length, dtype=torch.bool)

    numbers = tuple(range(variant.rows))
    if variant.batch == "padded":
        ids = torch.stack([row(LENGTH)[0] for _ in numbers])
        return TokenBatch(number, ids, ids.clone(), rows=numbers)
    third = LENGTH // 3
    sequences = [[row(third), row(third), row(LENGTH - 2 * third)] for _ in numbers]
    if variant.batch == "packed":
        return pack(sequences, number, numbers)
    return flat_batch(sequences, LENGTH, 1, True, number, numbers)


def batch_of(variant: Variant, vocabulary: int) -> Batch:
    """Return a batch of ``variant``'s layout."""
    micro_batches = [_micro_batch(variant, number, vocabulary) for number in range(variant.accumulation)]
    rows = variant.rows * variant.accumulation * variant.world_size
    targets = sum(m.supervised.numel() for m in micro_batches) * variant.world_size
    return Batch(micro_batches, rows, targets, {TOKENS: targets, ROWS: rows})


def answers(variant: Variant) -> dict[str, Answer]:
    """Return what code that branches on values of tensors is told, by the function that asks."""
    asked = itertools.count(1)
    ended = False

    def ends(value: torch.Tensor) -> float | bool:
        nonlocal ended
        if value.dtype != torch.bool:  # nothing that the loop asks
            return 1.0
        ended = next(asked) == NEW_TOKENS
        return ended

    return {
        "all_max": 0.0,  # no rank failed
        "all_sum": lambda value: float(value.storage_offset() < 2),  # a loss, a norm, and flags that are not set
        "find_packed_sequence_indices": variant.batch != "packed",
        "_has_unfinished_sequences": lambda _: float(not ended),  # the number of ranks that still generate
        "_sample": ends,  # asked once a token
    }


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(1024)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


def _plant(model: CausalModel, variant: Variant, stage: str) -> None:
    if variant.plant is not None and variant.plant_in == stage:
        PLANTS[variant.plant](model.base)


def live(
    model: CausalModel, config: RunConfig, targets: tuple[str, ...], batches: list[Batch], variant: Variant,
    ranks: Ranks, recorder: Recorder, folder: Path,
) -> None:  # fmt: skip
    """Train, evaluate, generate, save and export; each is a phase of ``recorder``."""
    optimizer = ShardedOptimizer(trainable_parameters(model), config.optim)
    objective = build_objective(config.objective.name)
    layers = model.compiled_layers
    settings = StepSettings(
        objective=objective, ranks=ranks, seed=0, max_grad_norm=1.0, synchronize=synchronize_gradients,
        around=contextlib.nullcontext, reduce=ReplicatedGradients(optimizer.parameters.items(), ranks),
        checks=(FirstGradients(model, ranks),),
        fallback=None if layers is None else EagerFallback(layers, ranks, True, lambda *_: None),
    )  # fmt: skip
    _plant(model, variant, "train")
    model.train()
    with torch.autograd.set_multithreading_enabled(False):
        batches = [
            replace(b, micro_batches=[m.pinned() for m in b.micro_batches]) for b in batches
        ]  # as the loader does
        for step, batch in zip(variant.steps, batches, strict=True):
            with recorder.in_phase(f"step {step}"):
                train_step(model, batch, optimizer, 1e-4, step, False, settings)
        if layers is not None and layers.failure is not None:  # answers to all_sum hide it from the step
            raise ConfigError(layers.failure)
        with recorder.in_phase("evaluate"):
            evaluate(model, batches[0].micro_batches, objective, batches[0].weights, ranks)
    _plant(model, variant, "generate")
    with recorder.in_phase("generate"):
        answer(model, _tokenizer(), EndOfTurn([1]), "w5 w6 w7", GenerateSettings(max_new_tokens=NEW_TOKENS))

    with recorder.in_phase("save"):
        checkpoint_tensors(optimizer.parameters.items(), optimizer)
    with recorder.in_phase("export"):
        adapter = gather_adapter(model)
        peft = build_method(config.lora.variant).peft(targets, config.lora, "CAUSAL_LM")
        try:
            export_adapter(folder / "adapter", adapter, peft, "base")
        except StorageError as error:
            recorder.ended = str(error)
