"""N ranks = 1 rank, resume = no interruption, whatever divides or not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora.distributed.mesh import Ranks
from tests.build import build, losses, next_rows, norms, run_fit, whole
from tests.tiers import some_in_full
from tests.tolerances import BF16_FIRST_LOSS, BF16_LOSSES, BF16_MEAN_LOSS, FP32_LOSSES, FP32_NORMS, close


def _train(pool, num_ranks, model, rows, root, name, layout="shard", timeout=180, **groups):
    settings = {"data": {"train": str(rows), "max_length": 64}, **copy.deepcopy(groups)}
    return pool.run(num_ranks, run_fit, str(model), str(root), name, settings, layout=layout, timeout=timeout)[0]


CASES = {
    "even": {"train": {"max_steps": 4, "global_batch_size": 12, "micro_batch_size": 2}},
    "not divisible": {"train": {"max_steps": 4, "global_batch_size": 7, "micro_batch_size": 2}},
    "fewer micro-batches than ranks": {"train": {"max_steps": 4, "global_batch_size": 2, "micro_batch_size": 1}},
    "dropout": {"train": {"max_steps": 4, "global_batch_size": 7, "micro_batch_size": 2}, "lora": {"dropout": 0.2}},
    "across epochs": {"train": {"max_steps": 5, "global_batch_size": 20, "micro_batch_size": 4}},
}


@pytest.mark.parametrize("case", some_in_full(CASES, ["not divisible", "dropout"]))
@pytest.mark.parametrize("quant", some_in_full(["nf4", "fp4", "none"], ["nf4"]))
def test_ranks_do_not_change_the_numbers_fp32(pool, tiny_model, chat_rows, tmp_path, case, quant):
    groups = {**CASES[case], "precision": {"name": "fp32"}, "quant": {"name": quant, "double_quant": quant != "none"}}
    one = _train(pool, 1, tiny_model, chat_rows, tmp_path, "one", **groups)["metrics"]
    for num_ranks in (2, 3):
        many = _train(pool, num_ranks, tiny_model, chat_rows, tmp_path, f"n{num_ranks}", **groups)["metrics"]
        assert close(losses(many), losses(one), FP32_LOSSES)
        assert close(norms(many), norms(one), FP32_NORMS)
        assert [m["target_tokens"] for m in many] == [m["target_tokens"] for m in one]
        assert [m["lr"] for m in many] == [m["lr"] for m in one]


def test_ranks_do_not_change_the_numbers_bf16(pool, tiny_model, chat_rows, tmp_path):
    groups = {"train": {"max_steps": 12, "global_batch_size": 7, "micro_batch_size": 2}}
    one = losses(_train(pool, 1, tiny_model, chat_rows, tmp_path, "one", **groups)["metrics"])
    for num_ranks in (2, 3):
        many = losses(_train(pool, num_ranks, tiny_model, chat_rows, tmp_path, f"n{num_ranks}", **groups)["metrics"])
        assert close(many[:1], one[:1], BF16_FIRST_LOSS)
        assert close(many, one, BF16_LOSSES)
        assert sum(abs(a - b) / b for a, b in zip(many, one, strict=True)) / len(one) <= BF16_MEAN_LOSS


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0.1), ("bf16", 0.0)])
def test_the_real_model_over_20_steps(pool, real_model, tmp_path, precision, dropout):
    from tests.tiny import write_chat_rows

    rows = write_chat_rows(tmp_path / "rows.jsonl", 64)
    groups = {
        "train": {"max_steps": 20, "global_batch_size": 3, "micro_batch_size": 1},
        "precision": {"name": precision},
        "lora": {"r": 8, "dropout": dropout},
        "optim": {"lr": 2e-4},
    }
    one = _train(pool, 1, real_model, rows, tmp_path, "one", timeout=600, **groups)["metrics"]
    for num_ranks in (2, 3):
        many = _train(pool, num_ranks, real_model, rows, tmp_path, f"n{num_ranks}", timeout=600, **groups)["metrics"]
        if precision == "fp32":
            assert close(losses(many), losses(one), FP32_LOSSES)
            assert close(norms(many), norms(one), FP32_NORMS)
        else:
            assert close(losses(many)[:1], losses(one)[:1], BF16_FIRST_LOSS)
            assert close(losses(many), losses(one), BF16_LOSSES)
            pairs = zip(losses(many), losses(one), strict=True)
            assert sum(abs(a - b) / b for a, b in pairs) / 20 <= BF16_MEAN_LOSS


def test_micro_batch_size_does_not_change_the_loss(pool, tiny_model, chat_rows, tmp_path):
    found = {}
    for size in (1, 3, 12):
        groups = {"train": {"max_steps": 2, "global_batch_size": 12, "micro_batch_size": size}}
        groups["precision"] = {"name": "fp32"}
        found[size] = losses(_train(pool, 2, tiny_model, chat_rows, tmp_path, f"m{size}", **groups)["metrics"])
    assert close(found[1], found[12], FP32_LOSSES)
    assert close(found[3], found[12], FP32_LOSSES)


CUTS = {
    "(1, 1)": (1, {"micro_batch_size": 24}, {}),
    "(4, 1)": (1, {"micro_batch_size": 6}, {}),
    "(1, 2)": (2, {"micro_batch_size": 12}, {}),
    "(2, 2)": (2, {"micro_batch_size": 6}, {}),
    "(1, 3)": (3, {"micro_batch_size": 8}, {}),
    "token budget": (3, {"micro_batch_tokens": 150}, {}),
    "padding-free": (2, {"micro_batch_tokens": 150}, {"padding_free": True}),
}


def _adapter(pool, num_ranks, model, rows, root, name, train, data):
    """Train two steps of plain gradient descent; return the adapter, which is then the gradients, and the losses."""
    groups = {
        "data": {"train": str(rows), "max_length": 128, **data}, "precision": {"name": "fp32"},
        "train": {"max_steps": 2, "global_batch_size": 24, "max_grad_norm": 0.0, **train},
        "optim": {"name": "sgd", "lr": 0.5, "beta1": 0.0}, "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip
    found = pool.run(num_ranks, run_fit, str(model), str(root), name, groups)[0]["metrics"]
    tensors = load_file(root / name / "adapter" / "adapter_model.safetensors")
    return losses(found), torch.cat([tensors[k].flatten() for k in sorted(tensors)])


@pytest.mark.parametrize("cut", list(CUTS)[1:])
def test_24_ragged_rows_give_the_same_gradients_however_they_are_cut(pool, tiny_model, tmp_path, cut):
    rows = tmp_path / "ragged.jsonl"
    made = [{"prompt": f"{n}? ", "completion": "abcdefgh " * (1 + (n * 7) % 12)} for n in range(24)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    wanted_losses, wanted = _adapter(pool, 1, tiny_model, rows, tmp_path, "one", *CUTS["(1, 1)"][1:])
    found_losses, found = _adapter(pool, CUTS[cut][0], tiny_model, rows, tmp_path, "cut", *CUTS[cut][1:])
    assert close(found_losses, wanted_losses, 1e-6)
    assert wanted_losses[0] - wanted_losses[1] > 1e-3
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_hybrid_sharding_gives_the_same_numbers(pool, tiny_model, chat_rows, tmp_path):
    groups = {"precision": {"name": "fp32"}, "train": {"max_steps": 3, "global_batch_size": 8, "micro_batch_size": 2}}
    plain = _train(pool, 4, tiny_model, chat_rows, tmp_path, "plain", **groups)["metrics"]
    groups["fsdp"] = {"replicate_degree": 2}
    hybrid = _train(pool, 4, tiny_model, chat_rows, tmp_path, "hybrid", layout="hybrid", **groups)["metrics"]
    assert close(losses(hybrid), losses(plain), FP32_LOSSES)
    assert close(norms(hybrid), norms(plain), FP32_NORMS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_activations_changes_no_bit(pool, tiny_model, chat_rows, tmp_path, precision):
    found = {}
    for kind in ("none", "full"):
        groups = {"train": {"max_steps": 3, "activation_checkpointing": kind}, "lora": {"dropout": 0.1}}
        groups["precision"] = {"name": precision}
        found[kind] = _train(pool, 2, tiny_model, chat_rows, tmp_path, kind, **groups)["metrics"]
    assert losses(found["full"]) == losses(found["none"])
    assert norms(found["full"]) == norms(found["none"])


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.full
def test_every_setting_learns(pool, tiny_model, chat_rows, tmp_path, reshard, optim, schedule):
    groups = {
        "train": {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 4},
        "fsdp": {"reshard_after_forward": reshard},
        "optim": {"name": optim, "lr": 5e-3 if optim == "adamw" else 0.3},
        "schedule": {"name": schedule},
    }
    found = losses(_train(pool, 2, tiny_model, chat_rows, tmp_path, "run", **groups)["metrics"])
    assert sum(found[-3:]) < sum(found[:3]) - 0.1


def test_evaluation_is_equal_on_any_number_of_ranks_and_does_not_disturb_training(
    pool, tiny_model, chat_rows, tmp_path
):
    base = {"train": {"max_steps": 4, "eval_every": 0}, "precision": {"name": "fp32"}}
    rows = {"train": str(chat_rows), "eval_fraction": 0.15, "max_length": 64}
    often = {"train": {"max_steps": 4, "eval_every": 1, "eval_batch_size": 2}, "precision": {"name": "fp32"}}
    seldom = _train(pool, 2, tiny_model, chat_rows, tmp_path, "seldom", **base, data=rows)["metrics"]
    found = {n: _train(pool, n, tiny_model, chat_rows, tmp_path, f"often{n}", **often, data=rows) for n in (1, 2, 3)}
    assert losses(found[2]["metrics"]) == losses(seldom)
    evals = {n: [m["eval_loss"] for m in r["metrics"] if "eval_loss" in m] for n, r in found.items()}
    assert len(evals[1]) == 5
    assert close(evals[2], evals[1], FP32_LOSSES)
    assert close(evals[3], evals[1], FP32_LOSSES)


def test_early_stopping(pool, tiny_model, chat_rows, tmp_path):
    groups = {
        "train": {"max_steps": 30, "eval_every": 1, "early_stopping_patience": 2},
        "data": {"train": str(chat_rows), "eval_fraction": 0.15, "max_length": 64},
        "optim": {"lr": 0.0},  # nothing gets better
    }
    found = _train(pool, 2, tiny_model, chat_rows, tmp_path, "run", **groups)
    assert found["summary"]["steps"] == 2


def _poisoned(ranks: Ranks, folder: str, rows: str, root: str) -> str:
    import torch

    from fsdp_qlora.adapters.names import trainable_parameters
    from fsdp_qlora.errors import NonFiniteError
    from fsdp_qlora.run.fit import fit

    prepared = build(ranks, folder, data={"train": rows}, run={"output_root": root, "name": "poison"})
    before = {n: whole(p).clone() for n, p in trainable_parameters(prepared.model)}
    if ranks.rank == ranks.size - 1:
        layer = prepared.model.base.get_submodule("model.layers.1.self_attn.q_proj")
        layer.register_forward_hook(lambda m, a, out: out * float("nan"))
    try:
        fit(prepared)
    except NonFiniteError as error:
        after = {n: whole(p) for n, p in trainable_parameters(prepared.model)}
        assert all(torch.equal(before[n], after[n]) for n in before)
        return str(error)
    return "trained on"


def test_a_nan_on_one_rank_stops_all_before_the_update(pool, tiny_model, chat_rows, tmp_path):
    messages = pool.run(2, _poisoned, str(tiny_model), str(chat_rows), str(tmp_path))
    assert all("step 1" in m and "not updated" in m for m in messages)


def _dead(ranks: Ranks, folder: str, rows: str, root: str, how: str) -> str:
    from fsdp_qlora.errors import NumericsError
    from fsdp_qlora.run.fit import fit

    prepared = build(ranks, folder, data={"train": rows}, run={"output_root": root, "name": f"dead-{how}"})
    layer = prepared.model.base.get_submodule("model.layers.1.self_attn.q_proj")
    if how == "cut":
        layer.set_adapter([])
        for parameter in [*layer.lora_A.parameters(), *layer.lora_B.parameters()]:
            parameter.requires_grad_(True)
    else:
        layer.scaling["default"] = 0.0
    try:
        fit(prepared)
    except NumericsError as error:
        return str(error)
    return "trained on"


def test_an_adapter_that_is_not_reached_is_named(pool, tiny_model, chat_rows, tmp_path):
    for how, words in {"cut": "got no gradient", "zero": "gradient of zero"}.items():
        messages = pool.run(2, _dead, str(tiny_model), str(chat_rows), str(tmp_path), how)
        assert all(words in m and "layers.1.self_attn.q_proj" in m for m in messages)


def _state(ranks: Ranks, folder: str, rows: str, root: str, steps: int, resume: str) -> dict:
    from fsdp_qlora.distributed.signals import StopSignals
    from fsdp_qlora.run.fit import _tracker
    from fsdp_qlora.run.folder import RunFolder
    from fsdp_qlora.run.training import Training

    prepared = build(
        ranks, folder, data={"train": rows}, run={"output_root": root, "name": "r"}, checkpoint={"resume": resume},
        train={"max_steps": steps, "global_batch_size": 6, "micro_batch_size": 2}, precision={"name": "fp32"},
        schedule={"name": "constant"},
    )  # fmt: skip
    run_folder = RunFolder(root, "r")
    run_folder.create()
    training = Training(prepared, run_folder)
    resumed = training.resume()
    after_load = {n: whole(t).clone() for n, t in training._tensors().items()} if resumed else {}
    following = next_rows(training)
    with _tracker(training, run_folder) as tracker:
        training.run(tracker, StopSignals())
    final = {n: whole(t).clone() for n, t in training._tensors().items()}
    return {"loaded": after_load, "next": following, "final": final, "position": training.progress.position}


@pytest.mark.parametrize("first", some_in_full([2, 3, 4], [2]))
@pytest.mark.parametrize("second", some_in_full([1, 2, 3], [3]))
def test_resume_on_another_world_size(pool, tiny_model, chat_rows, tmp_path, first, second):
    import torch

    base = tmp_path / "whole"
    whole = pool.run(first, _state, str(tiny_model), str(chat_rows), str(base), 4, "never")[0]
    split = tmp_path / "split"
    start = pool.run(first, _state, str(tiny_model), str(chat_rows), str(split), 2, "never")[0]
    rest = pool.run(second, _state, str(tiny_model), str(chat_rows), str(split), 4, "auto")[0]
    assert rest["loaded"].keys() == start["final"].keys()
    assert all(torch.equal(rest["loaded"][n], start["final"][n]) for n in start["final"])
    assert rest["position"] == whole["position"]
    for name, tensor in whole["final"].items():
        if first == second:
            assert torch.equal(rest["final"][name], tensor), name
        else:
            torch.testing.assert_close(rest["final"][name], tensor, rtol=1e-3, atol=1e-5)


def _out_of_memory(ranks: Ranks, folder: str, rows: str, root: str) -> str:
    """Let the device run out of memory in the second step, on every rank."""
    from fsdp_qlora.errors import PlanError
    from fsdp_qlora.run.fit import fit

    prepared = build(
        ranks, folder, data={"train": rows}, run={"output_root": root, "name": "r"},
        train={"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2},
    )  # fmt: skip
    calls = 0

    def run_out(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    prepared.model.base.get_decoder().register_forward_hook(run_out)
    try:
        fit(prepared)
    except PlanError as error:
        return str(error)
    return ""


def test_out_of_memory_says_what_was_planned_and_what_to_set(pool, tiny_model, chat_rows, tmp_path):
    for said in pool.run(2, _out_of_memory, str(tiny_model), str(chat_rows), str(tmp_path)):
        assert "step 2: out of memory on cpu: planned were" in said and "Tried to allocate 2.00 GiB" in said
        assert "Set fsdp.reshard_after_forward=true (planned peak" in said
