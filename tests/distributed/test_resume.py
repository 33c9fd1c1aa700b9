"""Resuming: the same state and the next batch on any number of ranks, and the same numbers on the same number."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.write import read_tensors
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.training import Training
from tests.build import build, essence, metrics, next_rows, run_fit
from tests.tiers import some_in_full
from tests.tiny import poisoned

OPTIMIZERS = ("adamw", "sgd")


def _groups(chat_rows: Path, optim: str, max_steps: int, **checkpoint) -> dict:
    return {
        "data": {"train": str(chat_rows), "eval_fraction": 0.1},
        "train": {"max_steps": max_steps, "global_batch_size": 7, "micro_batch_size": 2, "eval_every": 2},
        "schedule": {"name": "constant"},
        "lora": {"dropout": 0.1},
        "optim": {"name": optim, "weight_decay": 0.01},
        "checkpoint": checkpoint,
    }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _state(ranks: Ranks, model: str, root: str, name: str, groups: dict) -> tuple[dict[str, str], list[int], int]:
    """Resume and return the digest of every whole tensor, the rows of the next global batch, and the step."""
    prepared = build(ranks, model, run={"output_root": root, "name": name}, **groups)
    training = Training(prepared, RunFolder(root, name))
    assert training.resume() is not None
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in training._tensors().items()}
    batch = next_rows(training)
    return {n: _digest(t) for n, t in whole.items()}, batch, training.progress.step


@pytest.mark.parametrize("saved_by", some_in_full([1, 2, 3, 4], [3]))
def test_any_number_of_ranks_resumes_on_any_other(pool, tiny_model, chat_rows, tmp_path, saved_by):
    optim = OPTIMIZERS[saved_by % 2]
    pool.run(saved_by, run_fit, str(tiny_model), str(tmp_path), "run", _groups(chat_rows, optim, 3))
    saved = open_checkpoint(tmp_path / "run/checkpoints/step_00000003")
    expected = {n: _digest(t) for n, t in read_tensors(saved.folder, saved.manifest.tensors).items()}
    assert saved.manifest.world_size == saved_by and any(n.startswith("optim.") for n in expected)
    batches = set()
    for loaded_by, layout in ((1, "shard"), (2, "shard"), (3, "shard"), (4, "shard"), (4, "hybrid")):
        groups = _groups(chat_rows, optim, 6)
        for state, batch, step in pool.run(
            loaded_by, _state, str(tiny_model), str(tmp_path), "run", groups, layout=layout
        ):
            assert state == expected and step == 3
            batches.add(tuple(batch))
    assert len(batches) == 1


@pytest.mark.parametrize("optim", some_in_full(OPTIMIZERS, OPTIMIZERS[:1]))
@pytest.mark.parametrize(("num_ranks", "layout"), some_in_full([(2, "shard"), (4, "hybrid")], [(2, "shard")]))
def test_bit_equal_on_the_same_ranks(pool, tiny_model, chat_rows, tmp_path, optim, num_ranks, layout):
    def fit(name: str, steps: int) -> None:
        groups = _groups(chat_rows, optim, steps, every_steps=2)
        pool.run(num_ranks, run_fit, str(tiny_model), str(tmp_path), name, groups, layout=layout)

    fit("whole", 7)
    for steps in (3, 5, 7):  # 3 and 5 end between two regular checkpoints
        fit("split", steps)
    whole, split = (essence(metrics(tmp_path / n)) for n in ("whole", "split"))
    at_the_ends = [line for line in split if "eval_loss" in line and line["step"] in (3, 5)]
    assert len(at_the_ends) == 2  # a run's last step is always evaluated
    assert [line for line in split if line not in at_the_ends] == whole
    weights = [(tmp_path / f"{n}/adapter/adapter_model.safetensors").read_bytes() for n in ("whole", "split")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("second", some_in_full([2, 3], [3]))
def test_a_stream_goes_on_where_it_was(pool, tiny_model, chat_rows, tmp_path, second):
    def groups(steps: int) -> dict:
        return {
            "data": {"train": [str(chat_rows)] * 2, "weights": [0.7, 0.3], "streaming": True, "shuffle_window": 16},
            "train": {"max_steps": steps, "global_batch_size": 7, "micro_batch_tokens": 100},
            "schedule": {"name": "constant", "warmup_ratio": 0.0}, "precision": {"name": "fp32"},
        }  # fmt: skip

    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "whole", groups(6))
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "parts", groups(3))
    pool.run(second, run_fit, str(tiny_model), str(tmp_path), "parts", groups(6))
    whole, parts = (essence(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert [m["tokens"] for m in parts] == [m["tokens"] for m in whole]
    if second == 2:
        assert parts == whole
    assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(parts, whole, strict=True)) < 1e-5


def _by_rows(chat_rows: Path, size: int, **groups) -> dict:
    return {
        "data": {"train": str(chat_rows), "eval_fraction": 0.1}, "lora": {"dropout": 0.1},
        "train": {"max_steps": 0, "num_epochs": 1.0, "global_batch_size": size, "micro_batch_size": 2},
        "schedule": {"name": "linear", "warmup_ratio": 0.0}, **groups,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"),
    [(4, 8), pytest.param(8, 4, marks=pytest.mark.full), pytest.param(4, 7, marks=pytest.mark.full)],
)
def test_another_global_batch_goes_on_with_the_rows_that_are_left(pool, tiny_model, chat_rows, tmp_path, first, second):
    """An epoch is one of rows: nothing is left out, nothing comes twice, and the last step is evaluated."""
    begun = _by_rows(chat_rows, first)
    begun["train"] |= {"num_epochs": 1 / 3}
    begun["schedule"]["name"] = "constant"
    (half, *_) = pool.run(2, run_fit, str(tiny_model), str(tmp_path), "run", begun)
    rows = half["summary"]["data"]["rows"]
    before = round(rows / 3)
    resumed = _by_rows(chat_rows, second, checkpoint={"resume_overrides": ["train.global_batch_size", "schedule"]})
    resumed["schedule"]["name"] = "constant"
    (whole, *_) = pool.run(2, run_fit, str(tiny_model), str(tmp_path), "run", resumed)
    steps = -(-before // first) + -(-(rows - before) // second)
    assert whole["summary"]["steps"] == steps
    evaluated = [line["step"] for line in whole["metrics"] if "eval_loss" in line]
    assert evaluated[-1] == steps
    (straight, *_) = pool.run(2, run_fit, str(tiny_model), str(tmp_path), "straight", _by_rows(chat_rows, 4))
    assert whole["summary"]["tokens"] == straight["summary"]["tokens"]  # each row once


@pytest.mark.parametrize("size", [6, 44])
def test_after_a_skipped_batch_the_end_is_evaluated(pool, tiny_model, chat_rows, tmp_path, size):
    """Also where it was the last batch: what the summary shows is the loss of the weights that are given away."""
    model, file, _ = poisoned(tiny_model, chat_rows, tmp_path)
    groups = _by_rows(file, size)
    groups["data"] |= {"eval": str(chat_rows), "eval_fraction": 0.0}
    groups["train"] |= {"on_nonfinite": "skip", "log_every": 100}
    (run, *_) = pool.run(2, run_fit, str(model), str(tmp_path), "run", groups)
    lines, summary = run["metrics"], run["summary"]
    assert summary["rows_left_out"] > 0
    last = [line for line in lines if "eval_loss" in line][-1]
    assert last["step"] == summary["steps"] == max(1, -(-48 // size) - 1)
    assert summary["eval_loss_after"] == last["eval_loss"] != summary["eval_loss_before"]
