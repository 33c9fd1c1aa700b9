"""How long does a save hold up training? `python -m benchmarks.checkpoint` (make bench).

The same tensors, an adapter of about 100 MB (750 matrices, float32) with AdamW's two states, are saved by turns in four
ways: ours in the background, ours waiting for the disk, `dcp.async_save` as it comes, and Hugging Face Trainer's own
methods (`_save` and `_save_optimizer_and_scheduler`: safetensors and `torch.save`, which sync nothing to the disk).
One process, one gloo rank, one thread for torch of two cores, as a rank of two would have. After each save comes a
forward and backward of half a second; measured are the time that saving held up the main thread (before and after it),
and the time lost, which also counts how much slower that forward and backward was than alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from fsdp_qlora.checkpoint.checkpointer import Checkpointer, Snapshot
from fsdp_qlora.checkpoint.contents import checkpoint_tensors
from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.distributed.mesh import Ranks, build_ranks
from fsdp_qlora.distributed.process import Placement, process_group
from fsdp_qlora.optim.optimizers import ShardedOptimizer

NUM_MATRICES, SHAPE = 750, (16, 2184)
TRAINER = "Hugging Face Trainer"


@dataclass(frozen=True)
class Way:
    """One way to save."""

    save: Callable[[int], None]
    before_update: Callable[[], None]
    settle: Callable[[], object]
    """Wait for the disk; outside the clock, for in a run more steps would follow."""


class Adapter(PreTrainedModel):
    """As many trainable matrices as an adapter has."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(SHAPE)) for _ in range(NUM_MATRICES))


def _ours(ranks: Ranks, folder: Path, asynchronous: bool) -> Way:
    parameters = [
        (f"m{i}", nn.Parameter(DTensor.from_local(torch.randn(SHAPE), ranks.mesh, [Shard(0)], run_check=False)))
        for i in range(NUM_MATRICES)
    ]
    optimizer = ShardedOptimizer(parameters, OptimSettings(lr=1e-4))
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1e-4)
    checkpointer = Checkpointer(folder, ranks, asynchronous=asynchronous)

    def tensors() -> dict[str, torch.Tensor]:
        return checkpoint_tensors(parameters, optimizer)

    return Way(
        lambda step: checkpointer.save(Snapshot(step, {}, {}, {}), tensors),
        checkpointer.before_update,
        checkpointer.settle,
    )


def _plain_async(ranks: Ranks, folder: Path) -> Way:
    tensors = {
        f"{kind}.m{i}": DTensor.from_local(torch.randn(SHAPE), ranks.mesh, [Shard(0)], run_check=False)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for i in range(NUM_MATRICES)
    }

    futures: list[Any] = []

    def save(step: int) -> None:
        writer = HuggingFaceStorageWriter(str(folder / str(step % 2)), save_distributed=True)
        futures.append(async_save(dict(tensors), storage_writer=writer, process_group=ranks.background))

    return Way(save, lambda: None, lambda: futures.pop().result())


def _trainer(folder: Path) -> Way:
    model = Adapter(PretrainedConfig())
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    assert trainer.optimizer is not None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()

    def save(step: int) -> None:
        target = folder / str(step % 2)
        trainer._save(str(target))
        trainer._save_optimizer_and_scheduler(str(target))

    return Way(save, lambda: None, lambda: None)


def _forward_and_backward(size: int = 1024, rounds: int = 10) -> float:
    """Compute for a while; return the seconds."""
    started = time.perf_counter()
    weight = torch.ones(size, size, requires_grad=True)
    for _ in range(rounds):
        (torch.ones(size, size) @ weight).sum().backward()
    return time.perf_counter() - started


def measure(rounds: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return (stall, time lost) in seconds of each save, by turns; the first round warms up and is left out."""
    os.environ.pop("MASTER_ADDR", None)
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), Placement(0, 0, 1, 1), 600) as group:
        ranks = build_ranks(group, torch.device("cpu"))
        ways = {
            "ours, in the background": _ours(ranks, folder / "async", True),
            "ours, waiting for the disk": _ours(ranks, folder / "sync", False),
            "dcp.async_save as it comes": _plain_async(ranks, folder / "dcp"),
            TRAINER: _trainer(folder / "trainer"),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                alone = _forward_and_backward()
                started = time.perf_counter()
                way.save(number)
                held = time.perf_counter() - started
                with_save = _forward_and_backward()
                started = time.perf_counter()
                way.before_update()
                held += time.perf_counter() - started
                way.settle()
                if number:
                    found[name].append((held, held + with_save - alone))
    return found


def main() -> None:
    """Measure and write benchmarks/results/checkpoint.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        found = measure(options.rounds, Path(scratch))
    held, lost = ({n: statistics.median(v[i] for v in values) for n, values in found.items()} for i in (0, 1))
    rows = "\n".join(
        f"| {n} | {held[n]:.4f} | {min(v[0] for v in values):.4f} - {max(v[0] for v in values):.4f} | "
        f"{held[n] / held[TRAINER]:.4f} | {lost[n]:.3f} | {lost[n] / lost[TRAINER]:.2f} |"
        for n, values in found.items()
    )
    megabytes = 4 * NUM_MATRICES * SHAPE[0] * SHAPE[1] / 1e6
    text = f"""# How long a save holds up training

`python -m benchmarks.checkpoint` ({time.strftime("%Y-%m-%d")}, {os.cpu_count()} CPU cores, torch {torch.__version__}):
an adapter of {megabytes:.0f} MB in {NUM_MATRICES} matrices and AdamW's states of twice that; {options.rounds} rounds by
turns after one to warm up; medians in seconds. What is measured: the docstring of `benchmarks/checkpoint.py`.

| way | held up | range | of Trainer's | lost | of Trainer's |
|---|---|---|---|---|---|
{rows}

Ours and DCP's are on the disk (`fsync`) before they count; Trainer's are in the page cache when it returns.
"""
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
