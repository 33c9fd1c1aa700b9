"""A run of ours, and the same training by transformers' own `Trainer` from the files that plain PEFT reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from fsdp_qlora.adapters.names import base_name, trainable_parameters
from fsdp_qlora.data.loader import NamedBatch
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.signals import StopSignals
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.training import Training
from fsdp_qlora.track.tracker import JsonLines, Tracker
from tests import tolerances
from tests.build import build, config_of, metrics, whole

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """What a training did."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Learning rates."""
    norms: list[float] = field(default_factory=list)
    """Of the gradients, before clipping."""
    gradients: list[Tensors] = field(default_factory=list)
    """After clipping, by name in PEFT's file."""
    adapter: Tensors = field(default_factory=dict)
    """The trained tensors at the end, by name in PEFT's file."""


@dataclass(frozen=True)
class Start:
    """What our run is before its first step."""

    adapter: Path
    """As it is exported."""
    batches: list[Tensors]
    """The rows of each step, whole."""
    rows: list[tuple[int, ...]]
    """Their numbers in the prepared data."""
    quantized: frozenset[str]
    """Modules whose weights are quantized."""


def start(ranks: Ranks, folder: str, root: str, groups: dict[str, Any]) -> Start:
    """Export our first adapter; return it with all batches, each in one micro-batch."""
    size = groups["train"]["global_batch_size"]
    groups = {**groups, "train": {**groups["train"], "micro_batch_size": size}}
    training = _training(ranks, folder, root, "start", groups)
    training.export()
    batches, rows = [], []
    for step in range(training.config.train.max_steps):
        (micro_batch,) = training.batches.batch_at(step * size).micro_batches
        assert isinstance(micro_batch, NamedBatch)
        batches.append(dict(micro_batch.tensors))
        rows.append(micro_batch.rows)
    training.batches.batch_at.close()
    quantized = frozenset(p.linear.parameter.removesuffix(".weight") for p in training.prepared.plan.quantized)
    training.prepared.close()
    return Start(training.folder.adapter, batches, rows, quantized)


def run(ranks: Ranks, folder: str, root: str, name: str, groups: dict[str, Any]) -> Steps:
    """Train as `fit` does; return what was done, with the gradients that the optimizer is given."""
    training = _training(ranks, folder, root, name, groups)
    made = Steps()

    def keep(*_: Any) -> None:
        parameters = training.optimizer.parameters.items()
        made.gradients.append({n: whole(p.grad).detach().clone() for n, p in parameters if p.grad is not None})

    handle = training.optimizer.inner.register_step_pre_hook(keep)
    tracker = Tracker([JsonLines(training.folder.metrics_file, 0, training.unwritten)] if ranks.is_main else [])
    training.run(tracker, StopSignals())
    handle.remove()
    tracker.close()
    training.close()
    training.export()
    training.prepared.close()
    if ranks.is_main:
        for line in metrics(training.folder.path):
            if "loss" in line:
                made.losses.append(line["loss"])
                made.rates.append(line["lr"])
                made.norms.append(line["grad_norm"])
        made.adapter.update(load_file(training.folder.adapter / "adapter_model.safetensors"))
    return made


def _training(ranks: Ranks, folder: str, root: str, name: str, groups: dict[str, Any]) -> Training:
    run_folder = RunFolder(root, name)
    run_folder.create()
    return Training(build(ranks, folder, run={"output_root": root, "name": name}, **groups), run_folder)


def stock_model(base: Path, adapter: Path, skipped: list[str] | None) -> PeftModel:
    """Return transformers' own class with bitsandbytes' layers, under plain PEFT with an exported adapter to train.

    Args:
        base: folder of the model.
        adapter: the export; where a head is trained, it has the config that names the labels.
        skipped: names of modules that bitsandbytes leaves as they are; None: those that transformers chooses.
    """
    config = AutoConfig.from_pretrained(adapter if (adapter / "config.json").is_file() else base)
    quant = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped,
    )  # fmt: skip
    with _one_thread():
        model = getattr(transformers, config.architectures[0]).from_pretrained(
            base, config=config, quantization_config=quant, dtype=torch.float32, attn_implementation="eager"
        )
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, as our ranks do: bitsandbytes' mean of the statistics depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_4_bits(model: nn.Module) -> set[str]:
    """Return the modules of the base that are bitsandbytes' own 4-bit layers."""
    names = (name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
    return {base_name(name).removesuffix(".base_layer") for name in names}


class _Watch(TrainerCallback):
    """Keeps the gradients that the optimizer is given, and what is logged."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.made = model, Steps()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trained = trainable_parameters(self.model)
        self.made.gradients.append({n: p.grad.detach().clone() for n, p in trained if p.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.made.losses.append(logs["loss"])
            self.made.rates.append(logs["learning_rate"])
            self.made.norms.append(logs["grad_norm"])


def stock_run(model: PeftModel, folder: Path, groups: dict[str, Any], steps: list[list[Mapping[str, Any]]]) -> Steps:
    """Train with transformers' `Trainer` as our settings say; ``steps``: the micro-batches of each."""
    config = config_of("", **groups)
    optim, train = config.optim, config.train
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        max_steps=train.max_steps, per_device_train_batch_size=1, gradient_accumulation_steps=len(steps[0]),
        train_sampling_strategy="sequential", remove_unused_columns=False, optim="adamw_torch",
        learning_rate=optim.peak_lr, lr_scheduler_type=config.schedule.name, warmup_steps=0,
        weight_decay=optim.weight_decay, adam_beta1=optim.beta1, adam_beta2=optim.beta2, adam_epsilon=optim.eps,
        max_grad_norm=train.max_grad_norm,
    )  # fmt: skip
    watch = _Watch(model)
    trainer = Trainer(
        model, arguments, data_collator=lambda rows: dict(*rows), callbacks=[watch],
        train_dataset=[part for step in steps for part in step],  # type: ignore[arg-type]
    )  # fmt: skip
    with _one_thread():
        trainer.train()
    watch.made.adapter.update({name: p.detach().clone() for name, p in trainable_parameters(model)})
    return watch.made


def differences(ours: Steps, theirs: Steps) -> dict[str, float]:
    """Return the largest difference of each kind: losses and the like relative to each, tensors to their largest element.

    All gradients of a step are one tensor here, and so are those of the adapter.
    """
    return {
        "losses": max(tolerances.apart(ours.losses, theirs.losses)),
        "rates": max(tolerances.apart(ours.rates, theirs.rates)),
        "norms": max(tolerances.apart(ours.norms, theirs.norms)),
        "gradients": max(_apart(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True)),
        "adapter": _apart(ours.adapter, theirs.adapter),
    }


def _apart(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys() != set(), sorted(ours.keys() ^ theirs.keys())[:4]
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest
