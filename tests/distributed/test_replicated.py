"""``fsdp.adapters=replicated``: the numbers, checkpoints and adapters of sharded ones; copies that stay equal."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.write import read_tensors
from fsdp_qlora.checks.copies import require_equal_copies
from fsdp_qlora.config.rules import failures
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.parallel.shard import require_sharded
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.training import Training
from fsdp_qlora.simulate.step import step_runner, worst_batch
from tests.build import build, config_of, losses, metrics, norms, run_fit
from tests.tiers import some_in_full
from tests.tolerances import BF16_FIRST_LOSS, BF16_LOSSES, BF16_MEAN_LOSS, FP32_LOSSES, FP32_NORMS, apart

STEPS = {"max_steps": 4, "global_batch_size": 7, "micro_batch_size": 2}  # 4 micro-batches: of weight zero on 3 ranks


def _groups(rows: Path, adapters: str, **groups: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "data": {"train": str(rows), "max_length": 64}, "train": STEPS, "precision": {"name": "fp32"},
        "fsdp": {"adapters": adapters}, "optim": {"weight_decay": 0.01}, "schedule": {"name": "constant"},
    }  # fmt: skip
    for name, values in copy.deepcopy(groups).items():
        settings[name] = {**settings.get(name, {}), **values}
    return settings


def _train(
    pool, num_ranks: int, model: Path, root: Path, settings: dict[str, Any], layout: str = "shard"
) -> tuple[list[float], list[float]]:
    name = f"{settings['fsdp']['adapters']}-{num_ranks}-{layout}"
    pool.run(num_ranks, run_fit, str(model), str(root), name, copy.deepcopy(settings), layout=layout)
    lines = metrics(root / name)
    return losses(lines), norms(lines)


def _compare(
    pool, model: Path, rows: Path, root: Path, ranks: Sequence[tuple[int, str]], **groups: dict[str, Any]
) -> None:
    """Compare replicated adapters on ``ranks`` with sharded ones on the first number of them."""
    hybrid = {"replicate_degree": 2}
    first, layout = ranks[0]
    wanted = _train(pool, first, model, root, _groups(rows, "sharded", **groups), layout)
    assert len(wanted[0]) == STEPS["max_steps"] and wanted[0][0] - wanted[0][-1] > 1e-2
    for num_ranks, layout in ranks:
        more = {**groups.get("fsdp", {}), **(hybrid if layout == "hybrid" else {})}
        settings = _groups(rows, "replicated", **{**groups, "fsdp": more})
        found = _train(pool, num_ranks, model, root, settings, layout)
        if settings["precision"]["name"] == "fp32":
            assert max(apart(found[0], wanted[0])) < FP32_LOSSES
            assert max(apart(found[1], wanted[1])) < FP32_NORMS
        else:
            differences = apart(found[0], wanted[0])
            assert differences[0] < BF16_FIRST_LOSS and max(differences) < BF16_LOSSES
            assert sum(differences) / len(differences) < BF16_MEAN_LOSS


def test_numbers_are_those_of_sharded_adapters(pool, tiny_model, chat_rows, tmp_path):
    ranks = [(1, "shard"), (2, "shard"), (3, "shard"), (4, "hybrid")]
    _compare(pool, tiny_model, chat_rows, tmp_path, ranks)


KINDS = {
    "bf16": {"precision": {"name": "bf16"}},
    "bf16, two products": {"precision": {"name": "bf16"}, "debug": {"name": "plain"}},
    "bf16, dropout, recomputed": {
        "precision": {"name": "bf16"}, "lora": {"dropout": 0.1}, "train": {"activation_checkpointing": "full"},
    },
    "not quantized, gathered once": {
        "quant": {"name": "none", "double_quant": False}, "fsdp": {"reshard_after_forward": "false"},
    },
    "offloaded activations": {"fsdp": {"offload": "activations"}, "train": {"activation_checkpointing": "none"}},
    "two products": {"debug": {"name": "plain"}},
    "dropout": {"lora": {"dropout": 0.1}},
    "recomputed": {"train": {"activation_checkpointing": "selective"}},
    "sgd": {"optim": {"name": "sgd", "lr": 0.3}},
}  # fmt: skip
FAST = tuple(KINDS)[:5]


@pytest.mark.parametrize("kind", some_in_full(FAST, FAST[:3]))
def test_numbers_of_other_kinds_of_runs(pool, tiny_model, chat_rows, tmp_path, kind):
    _compare(pool, tiny_model, chat_rows, tmp_path, [(2, "shard")], **KINDS[kind])


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind_of_run(pool, tiny_model, chat_rows, tmp_path, kind):
    ranks = [(1, "shard"), (2, "shard"), (3, "shard"), (4, "hybrid")]
    _compare(pool, tiny_model, chat_rows, tmp_path, ranks, **KINDS[kind])


def _state(ranks: Ranks, model: str, root: str, name: str, settings: dict[str, Any]) -> dict[str, str]:
    """Resume; return the digests of this rank's whole state, and of the adapter as it is exported."""
    training = Training(build(ranks, model, run={"output_root": root, "name": name}, **settings), RunFolder(root, name))
    assert training.resume() is not None
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in training._tensors().items()}
    training.export()
    file = (training.folder.adapter / "adapter_model.safetensors").read_bytes() if ranks.is_main else b""
    return {n: _digest(t) for n, t in whole.items()} | ({"exported": hashlib.sha256(file).hexdigest()} if file else {})


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _resume(pool, model: Path, rows: Path, root: Path, saved: tuple[str, int, str], loads: list) -> None:
    """Save with one kind of adapters and number of ranks, load with others: the same state and adapter, bit by bit."""
    adapters, num_ranks, layout = saved
    settings = _groups(rows, adapters, train={**STEPS, "max_steps": 2})
    _train(pool, num_ranks, model, root, settings, layout)
    name = f"{adapters}-{num_ranks}-{layout}"
    checkpoint = open_checkpoint(root / name / "checkpoints/step_00000002")  # each value is there just once
    wanted = {n: _digest(t) for n, t in read_tensors(checkpoint.folder, checkpoint.manifest.tensors).items()}
    assert sum(n.startswith("optim.") for n in wanted) == 2 * sum(n.startswith("model.") for n in wanted)
    weights = hashlib.sha256((root / name / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    for others, count, where in loads:
        going_on = _groups(rows, others, fsdp={"replicate_degree": 2 if where == "hybrid" else 1})
        found = pool.run(count, _state, str(model), str(root), name, going_on, layout=where)
        assert found[0].pop("exported") == weights
        assert all(state == wanted for state in found)
    again = {**going_on, "run": {"name": name}}
    pool.run(count, run_fit, str(model), str(root), name, again, layout=where)
    assert [line["step"] for line in metrics(root / name) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("saved", ["sharded", "replicated"])
def test_one_kind_of_adapters_goes_on_from_the_other(pool, tiny_model, chat_rows, tmp_path, saved):
    other = "replicated" if saved == "sharded" else "sharded"
    _resume(pool, tiny_model, chat_rows, tmp_path, (saved, 2, "shard"), [(saved, 2, "shard"), (other, 1, "shard")])


@pytest.mark.parametrize(
    ("optim", "adapters"),
    some_in_full(
        [(o, a) for o in ("adamw_8bit", "adafactor") for a in ("sharded", "replicated")], [("adafactor", "replicated")]
    ),
)
def test_states_of_other_optimizers_go_along(pool, tiny_model, chat_rows, tmp_path, optim, adapters):
    """Their statistics are of rows, columns and blocks: cut elsewhere where every rank has all of them."""
    optims = {"optim": {"name": optim, "lr": 2e-3}}
    wanted = _train(pool, 2, tiny_model, tmp_path, _groups(chat_rows, adapters, **optims))
    for kind, steps in ((adapters, 2), ("replicated" if adapters == "sharded" else "sharded", 4)):
        groups = _groups(chat_rows, kind, **optims, run={"name": "both"}, train={"max_steps": steps})
        pool.run(2, run_fit, str(tiny_model), str(tmp_path), "both", groups)
    lines = metrics(tmp_path / "both")
    assert max(apart(losses(lines), wanted[0])) < FP32_LOSSES
    assert max(apart(norms(lines), wanted[1])) < FP32_NORMS


@pytest.mark.full
@pytest.mark.parametrize("saved", ["sharded", "replicated"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_resume_between_kinds_of_adapters(pool, tiny_model, chat_rows, tmp_path, saved, num_ranks):
    places = [(1, "shard"), (2, "shard"), (3, "shard"), (4, "shard"), (4, "hybrid")]
    loads = [(kind, *place) for kind in ("sharded", "replicated") for place in places]
    _resume(pool, tiny_model, chat_rows, tmp_path, (saved, num_ranks, "shard"), loads)


def _fresh(ranks: Ranks, model: str, settings: dict[str, Any]) -> dict[str, str]:
    """Return the digests of the adapters that a new run begins with."""
    named = trainable_parameters(build(ranks, model, **settings).model)
    return {n: _digest(p.full_tensor() if isinstance(p, DTensor) else p) for n, p in named}


def test_a_run_begins_with_the_same_adapters(pool, tiny_model, chat_rows, tmp_path):
    made = _groups(chat_rows, "replicated")
    (wanted,) = pool.run(1, _fresh, str(tiny_model), _groups(chat_rows, "sharded"))
    assert pool.run(2, _fresh, str(tiny_model), made) == [wanted] * 2
    _train(pool, 2, tiny_model, tmp_path, made)
    old = {"lora": {"init_from": str(tmp_path / "replicated-2-shard/adapter")}}
    (trained,) = pool.run(1, _fresh, str(tiny_model), _groups(chat_rows, "sharded", **old))
    assert pool.run(2, _fresh, str(tiny_model), _groups(chat_rows, "replicated", **old)) == [trained] * 2
    assert trained.keys() == wanted.keys() and not trained.items() & wanted.items()


def _copies(ranks: Ranks, model: str, steps: int) -> tuple[list[str], str]:
    """Take steps, each with gradients of this rank's own; return digests of this rank's copies, and what is said of odd ones."""
    prepared = build(ranks, model, fsdp={"adapters": "replicated", "replicate_degree": ranks.num_replicas})
    named = dict(trainable_parameters(prepared.model))
    optimizer = ShardedOptimizer(named.items(), prepared.config.optim)
    reduce = ReplicatedGradients(named.items(), ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    found = []
    for _ in range(steps):
        own = {n: torch.randn(p.shape, generator=generator) for n, p in named.items()}
        for name, parameter in named.items():
            parameter.grad = own[name].clone()
        reduce()
        total = sum(float(p.grad.double().square().sum()) for p in named.values() if p.grad is not None)
        shares = optimizer.grad_square_sum(ranks).clone()
        torch.distributed.all_reduce(shares, group=ranks.group)
        assert abs(float(shares) / total - 1) < 1e-12  # each element counts once
        optimizer.step(1e-2, 0.7)
        found.append(_digest(torch.cat([p.detach().flatten() for p in named.values()])))
    require_equal_copies(named.items(), ranks)
    if ranks.rank == ranks.size - 1:
        next(iter(named.values())).data[0, 0] += 1
    try:
        require_equal_copies(named.items(), ranks)
    except NumericsError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(2, "shard"), (3, "shard"), pytest.param(4, "hybrid", marks=pytest.mark.full)]
)
def test_copies_stay_equal_and_odd_ones_are_named(pool, tiny_model, num_ranks, layout):
    first, *others = pool.run(num_ranks, _copies, str(tiny_model), 3, layout=layout)
    assert len(set(first[0])) == 3
    assert all(other == first for other in others)
    assert f"rank {num_ranks - 1}" in first[1] and "q_proj.lora_A" in first[1]


def _missing(ranks: Ranks) -> list[list[float] | None]:
    """Reduce where one parameter has a gradient on the last rank alone, and one has none anywhere."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 1)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 1), float(ranks.rank + 1))
    if ranks.rank == ranks.size - 1:
        parameters[1].grad = torch.full((2, 1), 5.0)
    ReplicatedGradients([(str(i), p) for i, p in enumerate(parameters)], ranks)()
    return [None if p.grad is None else p.grad.flatten().tolist() for p in parameters]


def test_a_missing_gradient_is_no_other_on_any_rank(pool):
    assert pool.run(2, _missing) == [[[3.0, 3.0], [5.0, 5.0], None]] * 2


def _held(ranks: Ranks, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return planned and held bytes; what is left whole must be refused where it should be sharded, and vice versa."""
    prepared = build(ranks, model, **settings)
    plan, config = prepared.plan, prepared.config
    named = dict(trainable_parameters(prepared.model))
    assert not any(isinstance(p, DTensor) for p in named.values())
    require_sharded(prepared.model, ranks, replicated=True)
    with pytest.raises(NumericsError, match="not sharded"):
        require_sharded(prepared.model, ranks)
    layer = prepared.model.base.model.layers[0]
    if isinstance(layer, FSDPModule):
        layer.unshard()
    gathered = sum(p.nbytes for p in layer.parameters() if not p.requires_grad)
    if isinstance(layer, FSDPModule):
        layer.reshard()
    optimizer = ShardedOptimizer(named.items(), config.optim)
    batch = worst_batch(plan, config, prepared.model.base, prepared.folder, ranks.rank)
    step_runner(build_objective(config.objective), config, prepared.model, batch, ranks)(lambda: None)
    storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in named.values()}  # type: ignore[union-attr]
    optimizer.step(1e-3)
    held = {
        "adapters": sum(p.nbytes for p in named.values()),
        "gradients": sum(storages.values()),  # with several ranks one flat tensor, with counts at its end
        "optimizer": optimizer.state_bytes(),
    }
    return {"held": held, "planned": plan.bytes, "unit": plan.memory.layers[0].gathered, "gathered": gathered}


@pytest.mark.parametrize(("num_ranks", "layout"), [(1, "shard"), (2, "shard"), (2, "copies"), (4, "hybrid")])
def test_planned_bytes_are_held(pool, tiny_model, num_ranks, layout):
    replicas = 1 if layout == "shard" else 2
    settings = {"fsdp": {"adapters": "replicated", "replicate_degree": replicas}, "data": {"max_length": 64}}
    for found in pool.run(num_ranks, _held, str(tiny_model), settings, layout=layout):
        held, planned = found["held"], found["planned"]
        assert (held["adapters"], held["optimizer"]) == (planned.adapters, planned.optimizer)
        # what backward left is as large as the adapters; it is there until the flat tensor takes its place
        assert held["gradients"] + (held["adapters"] if num_ranks > 1 else 0) == planned.gradients
        assert found["gathered"] == found["unit"]


def test_what_does_not_go_together_is_refused_by_name():
    for asked, words in (
        ({"fsdp": {"offload": "params"}}, "fsdp.offload=params"),
        ({"fsdp": {"offload": "all"}}, "fsdp.offload=all"),
        ({"quant": {"name": "none", "double_quant": False}}, "precision=fp32"),
    ):
        groups = {**asked, "fsdp": {**asked.get("fsdp", {}), "adapters": "replicated"}}
        (message,) = failures(config_of("m", **groups))
        assert message.startswith("fsdp.adapters: ") and words in message
