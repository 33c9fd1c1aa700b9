"""LoRA+: the learning rates and decays of PEFT's ``create_loraplus_optimizer``, under every optimizer and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters.loraplus import EMBEDDING_LR, learning_rates
from fsdp_qlora.adapters.names import adapter_key, trainable_parameters
from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from tests.build import build, essence, losses, metrics, refused_fit, run_fit, whole
from tests.tiers import some_in_full
from tests.unit.test_optim import OPTIMIZERS, original

LR, RATIO, DECAY = 2e-3, 16.0, 0.01


def _judged(folder: Path, config: peft.PeftConfig) -> tuple[Any, torch.optim.Optimizer]:
    """Return stock PEFT's model and its LoRA+ optimizer, with our decay."""
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    return model, optimizer


@pytest.mark.parametrize("kind", ["lora", "dora", "bias"])
def test_groups_are_those_of_peft(tiny_model, kind):
    more: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"lora_bias": True} if kind == "bias" else {}
    embedding = [] if kind == "bias" else ["embed_tokens"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", *embedding], **more)
    model, optimizer = _judged(tiny_model, config)
    wanted = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    settings = OptimSettings(lr=LR, loraplus_lr_ratio=RATIO, weight_decay=DECAY)
    trained = {adapter_key(n): p for n, p in model.named_parameters() if p.requires_grad}
    rates = learning_rates({name: p.shape for name, p in trained.items()}, settings)
    optimizer = ShardedOptimizer(trained.items(), settings, rates)
    found = {
        id(trained[leaf.name]): (LR * group["lr_scale"], group["weight_decay"])
        for leaf in optimizer._leaves
        for group in [optimizer._optimizer.group_of(leaf)]
    }
    assert found.keys() == wanted.keys()
    assert all(found[key] == pytest.approx(rates) for key, rates in wanted.items())
    assert {lr for lr, _ in wanted.values()} == {LR, LR * RATIO, *([EMBEDDING_LR] if embedding else [])}


def _updated(ranks: Ranks, folder: str, name: str, ratio: float) -> dict[str, torch.Tensor]:
    prepared = build(ranks, folder, model={"check": "off"}, lora={"r": 32})
    settings = OptimSettings(name=name, lr=LR, loraplus_lr_ratio=ratio, weight_decay=DECAY)
    trained = dict(trainable_parameters(prepared.model))
    rates = learning_rates({n: p.shape for n, p in trained.items()}, settings)
    optimizer = ShardedOptimizer(trained.items(), settings, rates)
    for number, (_, parameter) in enumerate(trainable_parameters(prepared.model)):
        torch.manual_seed(number)
        gradient = torch.randn(parameter.shape)
        parameter.grad = torch.zeros_like(parameter)
        start = 0
        if (rows := local_tensor(parameter).shape[0]) != parameter.shape[0]:
            start = ranks.shard_rank * -(-parameter.shape[0] // ranks.shard_size)
        local_tensor(parameter.grad).copy_(gradient[start : start + rows])
    optimizer.step(LR)
    return {n: whole(p.detach()).clone() for n, p in trainable_parameters(prepared.model)}


@pytest.mark.parametrize("name", some_in_full(OPTIMIZERS, {"adamw", "adafactor"}))
def test_each_optimizer_moves_a_and_b_as_its_original_with_these_rates(pool, tiny_model, name):
    found = pool.run(2, _updated, str(tiny_model), name, RATIO)[0]
    before = pool.run(2, _updated, str(tiny_model), name, 0.0)[0]
    faster = [n for n in found if "lora_B" in n]
    assert all(torch.equal(found[n], before[n]) for n in found if n not in faster)
    start = pool.run(1, _start, str(tiny_model))[0]
    for number, key in enumerate(found):
        torch.manual_seed(number)
        parameter = nn.Parameter(start[key].clone())
        parameter.grad = torch.randn(parameter.shape)
        rate = LR * RATIO if key in faster else LR
        original(name, [parameter], OptimSettings(name=name, lr=rate, weight_decay=DECAY)).step()
        moved = parameter.detach() - start[key]
        assert float((found[key] - parameter).norm()) <= 1e-5 * float(moved.norm()), key


def _start(ranks: Ranks, folder: str) -> dict[str, torch.Tensor]:
    prepared = build(ranks, folder, model={"check": "off"}, lora={"r": 32})
    return {n: whole(p.detach()).clone() for n, p in trainable_parameters(prepared.model)}


def _groups(rows: Path, steps: int, **optim: Any) -> dict[str, Any]:
    return {
        "data": {"train": str(rows), "max_length": 64}, "model": {"check": "off"},
        "train": {"max_steps": steps, "global_batch_size": 6, "micro_batch_size": 3},
        "optim": {"lr": LR, **optim}, "schedule": {"name": "constant"},
    }  # fmt: skip


@pytest.mark.parametrize("name", some_in_full(["adamw", "adamw_8bit", "adafactor"], {"adamw"}))
def test_a_resumed_run_is_one_that_was_not(pool, tiny_model, chat_rows, tmp_path, name):
    for run, steps in (("whole", 5), ("split", 3), ("split", 5)):
        groups = _groups(chat_rows, steps, name=name, loraplus_lr_ratio=RATIO)
        pool.run(2, run_fit, str(tiny_model), str(tmp_path), run, groups)
    whole_run, split = (essence(metrics(tmp_path / run)) for run in ("whole", "split"))
    assert split == whole_run and len(whole_run) == 5
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "plain", _groups(chat_rows, 5, name=name))
    assert losses(metrics(tmp_path / "plain"))[2:] != losses(whole_run)[2:]


def test_another_ratio_is_refused_on_resume_and_a_method_without_b_at_once(pool, tiny_model, chat_rows, tmp_path):
    pool.run(1, run_fit, str(tiny_model), str(tmp_path), "run", _groups(chat_rows, 1, loraplus_lr_ratio=RATIO))
    said = pool.run(1, refused_fit, str(tiny_model), str(tmp_path), _groups(chat_rows, 2))[0]
    assert said.startswith("2 optim.loraplus_lr_ratio: 16.0 in the checkpoint, None now.")
    groups = _groups(chat_rows, 1, loraplus_lr_ratio=RATIO) | {"lora": {"variant": "oft"}}
    said = pool.run(1, refused_fit, str(tiny_model), str(tmp_path / "oft"), groups)[0]
    assert said.startswith("2 optim.loraplus_lr_ratio: ") and "oft" in said
