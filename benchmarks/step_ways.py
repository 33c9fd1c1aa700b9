"""The ways to train that `benchmarks.step` compares: each builds a `Stepper` on the same model and the same batches.

Same in all: the base in 4-bit NF4 with double quantization (but ``bf16 LoRA``), compute in bf16, LoRA on all linears of
the decoder layers with alpha = 2 r and no dropout, AdamW, clipping at 1.0, one row of ``length`` tokens per rank and
step with real chat masks, causal attention over the whole row.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step_rows import Rows
from fsdp_qlora.distributed.process import Placement

Stepper = Callable[[], None]
"""Trains one step."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Spec:
    """What one rank of a benchmark runs."""

    way: str
    """A key of `WAYS`."""
    model: str
    """Folder of the model."""
    rows: str
    """File of the batches, see `benchmarks.step_rows`."""
    r: int = 16
    checkpointing: bool = False
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of ours: settings by group."""
    attention: str = "sdpa"
    """Of the bare loop."""
    batch: int = 1
    """Rows of a rank's step."""
    fsdp: bool = False
    """Of TRL: shard by accelerate's FSDP2, which takes an accelerator."""


@contextlib.contextmanager
def ours(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, dict[str, Any]]]:
    """Train as `fsdp-qlora train` does: `prepare`, then `train_step`."""
    from fsdp_qlora.adapters.names import trainable_parameters
    from fsdp_qlora.adapters.replicated import ReplicatedGradients
    from fsdp_qlora.config.schema import from_dict
    from fsdp_qlora.data.loader import Batch, MicroBatch
    from fsdp_qlora.objectives import build_objective
    from fsdp_qlora.optim.optimizers import ShardedOptimizer
    from fsdp_qlora.parallel.shard import synchronize_gradients
    from fsdp_qlora.plan.timing import model_flops
    from fsdp_qlora.run.prepare import prepare
    from fsdp_qlora.train.step import StepSettings, train_step

    values: dict[str, dict[str, Any]] = {
        "model": {"name": spec.model},
        "data": {"max_length": rows.length},
        "lora": {"r": spec.r, "alpha": 2 * spec.r},
        "train": {
            "activation_checkpointing": "full" if spec.checkpointing else "none",
            "global_batch_size": spec.batch * placement.world_size, "micro_batch_size": spec.batch, "max_steps": 1000,
        },
    }  # fmt: skip
    for group, settings in spec.overrides.items():
        values[group] = {**values.get(group, {}), **settings}
    config = from_dict(values)
    prepared = prepare(config)
    ranks = prepared.ranks
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), config.optim)
    settings = StepSettings(
        objective=build_objective("sft"), ranks=ranks, seed=0, max_grad_norm=1.0, synchronize=synchronize_gradients,
        around=contextlib.nullcontext, reduce=ReplicatedGradients(optimizer.parameters.items(), ranks),
        checks=_compiled(prepared),
    )  # fmt: skip
    prepared.model.train()
    number = 0

    def step() -> None:
        nonlocal number
        ids, labels = rows.of(number, ranks.rank, ranks.size, spec.batch)
        everywhere = [rows.of(number, r, ranks.size, spec.batch)[1] for r in range(ranks.size)]
        targets = sum(int((found[:, 1:] != -100).sum()) for found in everywhere)
        batch = Batch([MicroBatch(ranks.rank, ids, labels)], ranks.size, ids.numel() * ranks.size, targets)
        number += 1
        train_step(prepared.model, batch, optimizer, 2e-4, number, False, settings)

    gathered = prepared.plan.memory.gathered_bytes(prepared.plan.settings) * prepared.plan.batch.accumulation_steps
    tokens = spec.batch * rows.length * ranks.size
    known = {
        "read": prepared.load.bytes_read, "gathered": gathered, "planned": prepared.plan.peak,
        "step_flops": model_flops(
            prepared.plan, prepared.shapes, tokens, tokens * rows.supervised(), spec.batch * ranks.size
        ),
    }  # fmt: skip
    try:
        yield step, {**known, "choices": {key: str(choice) for key, choice in prepared.choices.items()}}
    finally:
        prepared.close()


@contextlib.contextmanager
def loop(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, dict[str, Any]]]:
    """Train our layers on one rank in a plain loop: their forward, backward, clipping and torch's AdamW."""
    from fsdp_qlora.adapters.names import trainable_parameters
    from fsdp_qlora.config.schema import from_dict
    from fsdp_qlora.data.loader import MicroBatch
    from fsdp_qlora.objectives.objective import token_losses
    from fsdp_qlora.run.prepare import prepare

    values: dict[str, dict[str, Any]] = {
        "model": {"name": spec.model}, "data": {"max_length": rows.length}, "train": {"compile": "false"},
        "lora": {"r": spec.r, "alpha": 2 * spec.r},
    }  # fmt: skip
    prepared = prepare(from_dict(values))
    model = prepared.model.train()
    trained = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    number = 0

    def step() -> None:
        nonlocal number
        ids, labels = rows.of(number, placement.rank, placement.world_size, spec.batch)
        number += 1
        targets = int((labels[:, 1:] != -100).sum())
        (token_losses(model, MicroBatch(0, ids, labels)).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    try:
        yield step, {}
    finally:
        prepared.close()


def _compiled(prepared: Any) -> list[Any]:
    """Return what ends a benchmark whose layers cannot be compiled: it would measure something else."""
    from fsdp_qlora.parallel.fallback import EagerFallback

    layers = prepared.model.compiled_layers
    return [] if layers is None else [EagerFallback(layers, prepared.ranks, True, lambda *_: None)]


def _peft(spec: Spec, attention: str) -> Any:
    """Return the bitsandbytes 4-bit base with PEFT's adapters, as their documentation shows."""
    from peft import LoraConfig, get_peft_model

    model = _base(spec, attention)
    config = LoraConfig(
        r=spec.r, lora_alpha=2 * spec.r, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _device() -> torch.device:
    return torch.device("cuda", Placement.from_env().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _base(spec: Spec, attention: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if spec.fsdp else torch.uint8,  # FSDP shards floating numbers only
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        spec.model, quantization_config=quantization, dtype=torch.bfloat16, attn_implementation=attention,
        device_map={"": str(_device())},
    )  # fmt: skip


@contextlib.contextmanager
def bare(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, dict[str, Any]]]:
    """Train with transformers, PEFT, DDP and torch's AdamW in a plain loop."""
    device = _device()
    torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    model = _peft(spec, spec.attention)
    model.train()
    if spec.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    wrapped = DistributedDataParallel(model) if placement.world_size > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    number = 0

    def step() -> None:
        nonlocal number
        ids, labels = rows.of(number, placement.rank, placement.world_size, spec.batch)
        number += 1
        wrapped(input_ids=ids.to(device), labels=labels.to(device), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    try:
        yield step, {}
    finally:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class Turns:
    """Lets a peer that owns its loop train a step at a time: its loop runs in a thread of its own."""

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        import threading

        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ended, self._error = False, None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def _run(self, loop: Callable[[Callable[[], None]], None]) -> None:
        try:
            loop(self._after_step)
        except BaseException as error:
            self._error = error
            self._done.release()
            raise

    def _after_step(self) -> None:
        self._done.release()
        self._go.acquire()

    def step(self) -> None:
        """Let the loop run until its next step is done."""
        if self._thread.is_alive():
            self._go.release()
        else:
            self._thread.start()
        self._done.acquire()
        if self._error is not None:
            raise SystemExit(f"the peer's loop failed: {self._error!r}")


@contextlib.contextmanager
def trl(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, dict[str, Any]]]:
    """Train with TRL's SFTTrainer, as its documentation shows: DDP, or with ``spec.fsdp`` accelerate's FSDP2."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if spec.fsdp and _device().type == "cpu":
        raise SystemExit("accelerate shards on accelerators only: on a CPU it makes DDP of TRL's FSDP2.")
    model = _base(spec, "sdpa")
    sharded: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "activation_checkpointing": spec.checkpointing},
    }
    dataset = Dataset.from_list([{"input_ids": a, "labels": b} for a, b in rows.lists()])
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, report_to=[], use_cpu=_device().type == "cpu", bf16=True, max_length=None,
            max_steps=100_000,
            per_device_train_batch_size=spec.batch, learning_rate=2e-4, save_strategy="no",
            gradient_checkpointing=spec.checkpointing and not spec.fsdp, logging_strategy="no", disable_tqdm=True,
            optim="adamw_torch", **(sharded if spec.fsdp else {}),
        )  # fmt: skip
        lora = LoraConfig(r=spec.r, lora_alpha=2 * spec.r, target_modules=LINEARS, task_type="CAUSAL_LM")

        class Pause(TrainerCallback):
            after_step: Callable[[], None]

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.after_step()

        pause = Pause()
        trainer = SFTTrainer(model, args=settings, train_dataset=dataset, peft_config=lora, callbacks=[pause])

        def loop(after_step: Callable[[], None]) -> None:
            pause.after_step = after_step
            trainer.train()

        yield Turns(loop).step, {}


@contextlib.contextmanager
def roofline(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, dict[str, Any]]]:
    """Multiply with the base's matrices in bf16, forward and for the input's gradient: nothing else.

    The head is multiplied with the supervised positions alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = [
        (m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": _device()}
    weights = [torch.randn(shape, **kind) for shape in shapes]
    head = torch.randn(config.vocab_size, config.hidden_size, **kind)
    inputs = {n: torch.randn(spec.batch * rows.length, n, **kind) for shape in shapes for n in shape}
    number = 0

    def step() -> None:
        nonlocal number
        _, labels = rows.of(number, placement.rank, placement.world_size, spec.batch)
        number += 1
        for weight in weights:
            out, into = weight.shape
            _ = inputs[into] @ weight.t()
            _ = inputs[out] @ weight
        logits = inputs[config.hidden_size][: int((labels[:, 1:] != -100).sum())] @ head.t()
        _ = logits @ head

    yield step, {}


WAYS = {"ours": ours, "loop": loop, "trl": trl, "bare": bare, "roofline": roofline}
