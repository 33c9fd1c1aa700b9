"""What cannot be trained beside adapters is refused by name, before anything is read."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import PlanError
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.plan.parameters import fates
from fsdp_qlora.plan.plan import make_plan


def _config(folder, **groups):
    return from_dict({"model": {"name": str(folder)}} | groups)


def _shapes(folder):
    return read_shapes(build_skeleton(folder, torch.float32, "eager"))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"lora": {"modules_to_save": ["lmhead"]}}, "lora.modules_to_save: 'lmhead' matches no module"),
        ({"lora": {"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]}}, "and lora.target_modules gives it"),
        ({"lora": {"modules_to_save": ["layers"]}}, "leaves no linear"),
        ({"lora": {"modules_to_save": ["lm_head"]}, "model": {"name": "x", "add_tokens": ["<x>"]}}, "add_tokens"),
        ({"lora": {"bias": "lora_only"}}, "lora.bias: no linear with an adapter has a bias"),
        ({"lora": {"target_modules": ["lm_head"], "variant": "dora"}}, "does not go with lora.variant=dora"),
        ({"lora": {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}}, "lora.init_lora_weights=pissa"),
        ({"lora": {"target_modules": ["embed_tokens"]}, "quant": {"embeddings": "nf4"}}, "quant.embeddings=nf4"),
    ],
)
def test_what_the_model_does_not_allow(tiny_model, groups, message):
    with pytest.raises(PlanError) as raised:
        make_plan(_config(tiny_model, **groups), _shapes(tiny_model), 2)
    assert message in str(raised.value) and raised.value.exit_code == 2
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"lora": {"modules_to_save": ["a"], "variant": "none"}, "quant": {"name": "none"}}, "lora.modules_to_save"),
        ({"lora": {"modules_to_save": ["a"]}, "fsdp": {"offload": "params"}}, "fsdp.offload=params"),
        ({"lora": {"modules_to_save": ["a"]}, "fsdp": {"adapters": "replicated"}}, "fsdp.adapters=replicated"),
        ({"lora": {"bias": "all", "variant": "ia3"}}, "lora.bias: only with lora, rslora, dora"),
        ({"lora": {"modules_to_save": [" "]}}, "must not be empty"),
    ],
)
def test_what_the_settings_do_not_allow(groups, message):
    (failure,) = failures(_config("x", **groups))
    assert message in failure


def test_the_plan_lists_them_as_trained_and_all_linear_leaves_them_out(tiny_model):
    shapes = _shapes(tiny_model)
    lora = {"modules_to_save": ["norm", "down_proj", "*.layers.0.self_attn.o_proj"]}
    plan = make_plan(_config(tiny_model, lora=lora), shapes, 2)
    told = fates(plan, shapes)
    assert plan.modules == (
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.norm",
    )  # fmt: skip
    assert {"model.norm.weight": 1, "model.layers.*.mlp.down_proj.weight": 2}.items() <= told["trained"].items()
    assert not told["trained"].keys() & told["quantized"].keys() - {"model.layers.*.self_attn.o_proj.weight"}
    assert not told["trained"].keys() & told["kept"].keys()
    assert len(plan.targets) == len(plan.quantized) == 14 - 3
