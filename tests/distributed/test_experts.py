"""LoRA on stacked experts, against PEFT's `target_parameters` on a dense copy of the same dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from fsdp_qlora.adapters.experts import peft_config, short_parameters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor, row_range
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.export.adapter import export_adapter, gather_adapter, short_targets
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.plan.timing import flops_per_token
from fsdp_qlora.run.build import load_model, open_model
from tests import upstream, uses
from tests.build import build, config_of, essence, losses, metrics, run_fit, whole
from tests.families import MOE, SMALL, write_family
from tests.tiers import some_in_full
from tests.upstream import write_random

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": SMALL | MOE | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "mixtral": SMALL | MOE,
    "olmoe": SMALL | MOE | {"intermediate_size": 64, "num_key_value_heads": 4},
    "gpt_oss": SMALL | MOE | {"intermediate_size": 64},
}
"""Model type -> settings; gpt-oss's stacks are transposed and have biases."""
LENGTH, R, EXPERTS_R, DOWN_R = 48, 4, 3, 2
OWN: dict[str, Any] = {
    "rank_pattern": {"*.experts.*": EXPERTS_R, "experts.down_proj": DOWN_R}, "alpha_pattern": {"*.experts.*": 5.0}
}  # fmt: skip
"""Ranks and alphas of the experts' own, and of one of their weights."""


def _write(folder: Path, family: str) -> Path:
    tokens = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return write_random(folder, AutoConfig.for_model(family, **tokens, **FAMILIES[family]))


def _settings(folder: str, **changes: dict[str, Any]) -> RunConfig:
    groups: dict[str, dict[str, Any]] = {
        "lora": {"r": R, "alpha": 8, "target_parameters": "experts", **OWN},
        "precision": {"name": "fp32"},
        "data": {"max_length": LENGTH},
        "train": {"micro_batch_size": 2, "compile": "false"},
        "quant": {"allow_16bit": True},
        "model": {"attn_implementation": "eager"},
    }
    for name, values in changes.items():
        groups[name] = {**groups.get(name, {}), **values}
    return config_of(folder, **groups)


def _judged(ranks: Ranks, folder: str, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how far our loss, our gradients and plain PEFT's loss with the exported adapter are from the judge's."""
    settings = _settings(folder, **changes)
    opened = open_model(settings, Path(folder), ranks, None)
    model, _ = load_model(opened.compiled(False), ranks)
    values = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainable_parameters(model)):
            values[name] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
            local_tensor(parameter).copy_(_own(values[name], parameter, ranks))
    ids = torch.randint(5, 100, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    loss = model.train()(ids, ids.clone(), None).sum()
    loss.backward()
    ReplicatedGradients(trainable_parameters(model), ranks)()
    lora, plan = opened.plan.settings.lora, opened.plan
    config = peft_config(plan.targets, [x.name for x in plan.parameters], lora)
    judge = get_peft_model(uses.rounded(Path(folder), torch.float32, plan.quantized), config).train()
    theirs = {n.replace(".default.", "."): p for n, p in judge.named_parameters() if p.requires_grad}
    assert theirs.keys() == values.keys(), sorted(theirs.keys() ^ values.keys())[:4]
    for name, value in values.items():
        theirs[name].data = value.clone()
    wanted = upstream.loss_sum(judge, ids)
    wanted.backward()
    gaps = []
    for name, parameter in trainable_parameters(model):
        full = theirs[name].grad
        assert full is not None and parameter.grad is not None, name
        mine = local_tensor(parameter.grad) / ranks.size
        gaps.append(float((mine - _own(full, parameter, ranks)).norm() / full.norm()))
    adapter = gather_adapter(model)
    exported = float("nan")
    if ranks.is_main:
        exported = _loss_of_export(adapter, opened, Path(folder), ids, model)
    held = {n: p.shape for n, p in trainable_parameters(model)}
    planned = {n: shape for tensors in plan.memory.trained.values() for n, shape in tensors.items()}
    return {
        "loss": float(abs(loss.detach() - wanted.detach()) / wanted.detach()), "gradient": max(gaps),
        "exported": abs(exported - float(wanted.detach())) / float(wanted.detach()),
        "planned": {n: tuple(s) for n, s in held.items()} == planned,
        "held": sum(local_tensor(p).numel() * 4 for _, p in trainable_parameters(model)),
        "adapters": plan.bytes.adapters, "stacks": len(plan.parameters), "quantized": len(plan.quantized),
    }  # fmt: skip


def _own(whole: torch.Tensor, parameter: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    if local_tensor(parameter).shape == whole.shape:
        return whole
    return whole[slice(*row_range(whole.shape[0], ranks.shard_rank, ranks.shard_size))]


def _loss_of_export(adapter, opened, folder: Path, ids: torch.Tensor, model) -> float:
    plan, lora = opened.plan, opened.plan.settings.lora
    parameters = short_parameters(plan.parameters, plan.memory.shapes.parameters)
    with TemporaryDirectory() as scratch:
        config = peft_config(short_targets(plan.targets, model.base), parameters, lora)
        export_adapter(Path(scratch), adapter, config, str(folder))
        base = uses.rounded(folder, torch.float32, plan.quantized)
        return float(upstream.loss_sum(PeftModel.from_pretrained(base, scratch).train(), ids).detach())


CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "qwen3_moe, replicated": ("qwen3_moe", {"fsdp": {"adapters": "replicated"}}),
    "qwen3_moe, copies": ("qwen3_moe", {"fsdp": {"shard_degree": 1}}),  # replicate_degree is the number of ranks
    "qwen3_moe, recomputed": ("qwen3_moe", {"train": {"activation_checkpointing": "full"}}),
    "qwen3_moe, selective": ("qwen3_moe", {"train": {"activation_checkpointing": "selective"}}),
    "qwen3_moe, kept dense": ("qwen3_moe", {"quant": {"cache_dequantized": "true"}}),
    "qwen3_moe, not quantized": ("qwen3_moe", {"quant": {"name": "none"}}),
    "gpt_oss, not quantized": ("gpt_oss", {"quant": {"name": "none"}}),
    "mixtral, one of two": (
        "mixtral",
        {"lora": {"target_parameters": ["experts.gate_up_proj"], "rank_pattern": {"gate_up_proj": EXPERTS_R}}},
    ),
    "mixtral, one layer": ("mixtral", {"lora": {"layers_to_transform": [1]}}),
    "mixtral, rslora": ("mixtral", {"lora": {"variant": "rslora"}}),
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", some_in_full(list(CASES), {"qwen3_moe", "gpt_oss"}))
def test_experts_train_as_in_peft_on_a_dense_copy(pool, tmp_path, case, num_ranks):
    family, changes = CASES[case]
    folder = _write(tmp_path / "model", family)
    copies = "copies" in case
    if copies:
        changes = {"fsdp": {**changes["fsdp"], "replicate_degree": num_ranks}}
    results = pool.run(num_ranks, _judged, str(folder), changes, layout="copies" if copies else "shard")
    for seen in results:
        assert seen["loss"] < 1e-5 and seen["gradient"] < 1e-4 and seen["planned"], seen
        assert seen["stacks"] == (2 if "one" in case else 4)
        assert seen["quantized"] > 4 or "not quantized" in case
    assert results[0]["exported"] < 1e-5
    assert results[0]["held"] == results[0]["adapters"]  # the fullest rank


def _gradients_of_unused(ranks: Ranks, folder: str) -> dict[str, bool]:
    """Return for each tensor of the experts' adapters whether unused experts' gradients are zeros, not missing."""
    opened = open_model(_settings(folder), Path(folder), ranks, None)
    model, _ = load_model(opened.compiled(False), ranks)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            local_tensor(parameter).fill_(0.01)
    chosen: set[int] = set()

    def see(_: Any, args: Any, kwargs: Any) -> None:
        chosen.update(kwargs.get("top_k_index", args[1] if len(args) > 1 else None).unique().tolist())

    experts = model.base.model.layers[0].mlp.experts.get_base_layer()
    experts.register_forward_pre_hook(see, with_kwargs=True)
    ids = torch.full((1, 4), 7)
    model.train()(ids, ids.clone(), None).sum().backward()
    unused = sorted(set(range(4)) - chosen)
    zeros = {}
    for name, parameter in trainable_parameters(model):
        if ".layers.0.mlp.experts." in name:
            assert parameter.grad is not None, name
            grad = whole(parameter.grad)
            turned = grad if "lora_A" in name else grad.view(grad.shape[0], -1, 4).permute(2, 0, 1)
            by_expert = turned.reshape(4, -1)
            zeros[name] = not by_expert[unused].any() and bool(by_expert.any())
    return {"unused": bool(unused), **zeros}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_expert_that_no_token_chose_has_a_gradient_of_zero(pool, tmp_path, num_ranks):
    folder = _write(tmp_path / "model", "qwen3_moe")
    for seen in pool.run(num_ranks, _gradients_of_unused, str(folder)):
        assert len(seen) == 5 and all(seen.values()), seen


def _groups(rows: Path, max_steps: int = 4, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {
        "data": {"train": str(rows), "max_length": 64, "max_rows": 12},
        "lora": {"target_parameters": "experts", "rank_pattern": {"*.experts.*": 2}},
        "train": {"max_steps": max_steps, "global_batch_size": 6, "micro_batch_size": 2},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }
    for name, values in more.items():
        groups[name] = {**groups.get(name, {}), **values}
    return groups


def test_a_resumed_run_equals_an_uninterrupted_one(pool, chat_rows, tmp_path):
    folder = write_family(tmp_path / "model", "qwen3_moe")
    pool.run(2, run_fit, str(folder), str(tmp_path), "whole", _groups(chat_rows))
    for steps in (2, 4):
        checkpoint = {"every_steps": 2, "resume": "auto"}
        pool.run(2, run_fit, str(folder), str(tmp_path), "parts", _groups(chat_rows, steps, checkpoint=checkpoint))
    whole, parts = (essence(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts and losses(whole)[0] - losses(whole)[-1] > 0.01
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_starts_from_another_and_from_a_file_of_peft_0_18(pool, chat_rows, tmp_path):
    """The 0.18 file is the run's own, with A and B exchanged as PEFT 0.18 had them; its first loss is the same."""
    folder = write_family(tmp_path / "model", "qwen3_moe")
    pool.run(1, run_fit, str(folder), str(tmp_path), "first", _groups(chat_rows, 2))
    new, old = tmp_path / "first" / "adapter", tmp_path / "old"
    _exchange(new, old, count=4)
    first = []
    for name, adapter in (("new", new), ("old", old)):
        groups = _groups(chat_rows, 1, lora={"init_from": str(adapter)})
        first.append(losses(pool.run(2, run_fit, str(folder), str(tmp_path), name, groups)[0]["metrics"])[0])
    assert first[0] == first[1]


def _exchange(new: Path, old: Path, count: int) -> None:
    old.mkdir()
    settings = json.loads((new / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps({**settings, "peft_version": "0.18.1"}))
    with safe_open(new / "adapter_model.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name in [n for n in tensors if ".experts." in n and ".lora_A." in n]:
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = tensors[name], tensors[other]
        r = a.shape[0] // count
        tensors[name] = b.view(-1, r, count).permute(2, 1, 0).reshape(count * r, -1).contiguous()
        tensors[other] = a.view(count, r, -1).permute(2, 1, 0).reshape(-1, r * count).contiguous()
    save_file(tensors, old / "adapter_model.safetensors", metadata={"format": "pt"})


def _refused(ranks: Ranks, folder: str, parameters: Any) -> str:
    try:
        build(ranks, folder, lora={"target_parameters": parameters})
    except FsdpQloraError as error:
        return str(error)
    return ""


def test_patterns_without_a_match_are_refused(pool, tmp_path, tiny_model):
    folder = _write(tmp_path / "model", "qwen3_moe")
    said = pool.run(1, _refused, str(folder), ["experts.gate_proj"])[0]
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj (or experts)" in said
    assert "no stacked expert weights" in pool.run(1, _refused, str(tiny_model), "experts")[0]


def test_a_token_is_counted_with_the_experts_it_goes_through(tmp_path):
    folder = _write(tmp_path / "model", "qwen3_moe")
    shapes = read_shapes(build_skeleton(folder, torch.float32, "eager"))
    none = {"target_parameters": "", "rank_pattern": {}, "alpha_pattern": {}}
    plans = [make_plan(_settings(str(folder), lora=lora), shapes, 2) for lora in ({}, none)]
    with_experts, without = plans
    extra = with_experts.trainable_parameters - without.trainable_parameters
    assert extra == 2 * 4 * (EXPERTS_R * (64 + 128) + DOWN_R * (64 + 64))  # layers, experts, r, in + out of each matrix
    forward = [flops_per_token(plan, shapes).forward for plan in plans]
    assert forward[0] - forward[1] == 2 * extra // 2  # 2 of 4 experts
    kept = [plan.memory.activations[0].saved for plan in plans]
    assert kept[0] - kept[1] == 2 * (64 + 64) * 4  # the inputs of both products, of 2 experts, in float32
