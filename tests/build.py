"""Runs inside the pool: a world on a sub-mesh, a config in two lines, a whole `fit`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.process import Placement
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.quant.packing import tensor_sha256
from fsdp_qlora.run.fit import fit
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.prepare import prepare
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.training import Training
from fsdp_qlora.run.world import World


def world_of(ranks: Ranks) -> World:
    """Return the pool's sub-mesh as the world of a run."""
    return World(ranks, Placement(ranks.rank, ranks.rank, ranks.size, ranks.size), 1, ExitStack())


def config_of(folder: str, **groups: dict[str, Any]) -> RunConfig:
    """Return settings of a short run on the model in ``folder``."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": folder},
        "data": {"max_length": 64, "eval_fraction": 0.0},
        "lora": {"r": 4, "alpha": 8},
        "train": {"max_steps": 4, "global_batch_size": 6, "micro_batch_size": 2, "sample_held_out": 0},
        "launcher": {"device": "cpu"},
        "optim": {"lr": 2e-3},
    }
    for name, settings in groups.items():
        values[name] = {**values.get(name, {}), **settings}
    return from_dict(values)


def build(ranks: Ranks, folder: str, **groups: dict[str, Any]) -> Prepared:
    """Prepare a model on the pool's sub-mesh."""
    return prepare(config_of(folder, **groups), world_of(ranks))


def run_fit(ranks: Ranks, folder: str, root: str, name: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Train on the pool's sub-mesh; return the metrics of the training steps, the summary and the state's digests."""
    run = {"output_root": root, "name": name, **groups.pop("run", {})}
    result = fit(build(ranks, folder, run=run, **groups))
    return {"summary": result.summary, "metrics": metrics(Path(root) / name)} if ranks.is_main else {}


def refused_fit(ranks: Ranks, folder: str, root: str, groups: dict[str, Any]) -> str:
    """Train as `run_fit`, under the name ``run``; return the exit code and message of the refusal."""
    try:
        run_fit(ranks, folder, root, "run", groups)
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def loaded_state(ranks: Ranks, folder: str, root: str, saved: str, groups: dict[str, Any]) -> dict[str, str]:
    """Return digests of everything trained and of its optimizer states, after loading a checkpoint."""
    run = {"output_root": root, "name": f"load{ranks.size}"}
    prepared = build(ranks, folder, checkpoint={"resume": saved}, run=run, **groups)
    training = Training(prepared, RunFolder(root, run["name"]))
    training.resume()
    tensors = training.optimizer.parameters | training.optimizer.state_tensors()
    digests = {name: tensor_sha256(whole(tensor.detach()).contiguous()) for name, tensor in tensors.items()}
    training.close()
    return digests


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter, gradient or state of all ranks; a rank that keeps it whole has it already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def next_rows(training: Training) -> list[int]:
    """Return the rows of the global batch that comes next, over all ranks; every rank calls it."""
    batch = training.batches.batch_at(training.progress.position)
    own = [row for m in batch.micro_batches if m.weight for row in m.rows]
    return sorted(row for part in gather_json(own, training.ranks) for row in part)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Return the training losses."""
    return [line["loss"] for line in lines if "loss" in line]


def norms(lines: list[dict[str, Any]]) -> list[float]:
    """Return the gradient norms."""
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


def essence(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of training and evaluation without what a clock or a memory meter says."""
    keep = ("step", "loss", "grad_norm", "lr", "tokens", "target_tokens", "eval_loss", "eval_perplexity")
    return [{k: m[k] for k in keep if k in m} for m in lines if "loss" in m or "eval_loss" in m]


def held_bytes(prepared: Prepared) -> dict[str, int]:
    """Return the bytes that this rank holds after a backward, as the plan calls them."""
    trained = dict(trainable_parameters(prepared.model))
    optimizer = ShardedOptimizer(trained.items(), prepared.config.optim)
    optimizer.prepare_state(1)
    frozen = [(n, local_tensor(p)) for n, p in prepared.model.named_parameters() if not p.requires_grad]
    packed = (".packed", ".absmax", ".nested")
    return {
        "adapters": sum(local_tensor(p).nbytes for p in trained.values()),
        "gradients": sum(local_tensor(p.grad).nbytes for p in trained.values() if p.grad is not None),
        "optimizer": optimizer.state_bytes(),
        "base_kept": sum(tensor.nbytes for name, tensor in frozen if not name.endswith(packed)),
    }
