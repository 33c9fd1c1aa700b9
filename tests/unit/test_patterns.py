"""Adapters of chosen modules, with ranks and alphas of their own; the judge of what a pattern does is plain PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters import of_target, spelt_out
from fsdp_qlora.adapters.folder import read_adapter_config, stored_modules
from fsdp_qlora.adapters.lora import attach_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.config.schema import LoraSettings, from_dict
from fsdp_qlora.errors import ConfigError, ModelError, PlanError
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.quant.swap import swap_linears
from fsdp_qlora.shapes.linears import quantized_linears
from fsdp_qlora.shapes.targets import target_linears

PATTERNS = LoraSettings(
    r=4, alpha=8.0, rank_pattern={"q_proj": 2, "*.layers.1.*": 6, "mlp.down_proj": 3}, alpha_pattern={"v_proj": 5.0}
)


def _shapes(folder):
    return read_shapes(build_skeleton(folder, torch.float32, "eager"))


@pytest.fixture
def attached(tiny_model):
    """Return a model on meta with adapters by patterns, its targets and their settings in whole names."""
    base = build_skeleton(tiny_model, torch.float32, "eager")
    shapes = read_shapes(base)
    targets = target_linears(shapes, "all-linear")
    swap_linears(base, quantized_linears(shapes), build_format())
    return attach_adapters(base, targets, PATTERNS), targets, spelt_out(PATTERNS, targets)


def test_ranks_and_scalings_are_those_that_plain_peft_gives_for_the_exported_config(tiny_model, attached):
    ours, targets, settings = attached
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )  # fmt: skip
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    shapes = {name: tuple(p.shape) for name, p in trainable_parameters(theirs)}
    assert {name: tuple(p.shape) for name, p in trainable_parameters(ours)} == shapes
    modules = dict(theirs.named_modules())
    scalings = {name: m.scaling for name, m in ours.named_modules() if hasattr(m, "lora_A")}
    assert len(scalings) == len(targets) and all(modules[name].scaling == s for name, s in scalings.items())
    assert len({s["default"] for s in scalings.values()}) > 3


def test_later_patterns_win_and_the_plan_counts_each_rank(tiny_model):
    values = {"model": {"name": str(tiny_model)}, "lora": {"r": 4, "rank_pattern": PATTERNS.rank_pattern}}
    shapes = _shapes(tiny_model)
    plan = make_plan(from_dict(values), shapes, 1, None)
    ranks = {name: of_target(plan.settings.lora, name).r for name in plan.targets}
    assert ranks["model.layers.1.self_attn.q_proj"] == 6 and ranks["model.layers.1.mlp.down_proj"] == 3
    assert ranks["model.layers.0.self_attn.q_proj"] == 2 and ranks["model.layers.0.self_attn.v_proj"] == 4
    linears = {x.name: x for x in shapes.linears}
    expected = sum(r * (linears[name].in_features + linears[name].out_features) for name, r in ranks.items())
    assert plan.trainable_parameters == expected


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"exclude_modules": ["mlp"]}, None),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"exclude_modules": ["*.layers.0.mlp.*"]}, 11),
        ({"layers_to_transform": [1]}, 7),
        ({"target_modules": ["*.self_attn.?_proj"], "layers_to_transform": [0]}, 4),
        ({"layers_to_transform": [2]}, None),
        ({"exclude_modules": ["*_proj"]}, None),
    ],
)
def test_modules_are_chosen_by_patterns(tiny_model, settings, left):
    asked = LoraSettings(**settings)
    shapes = _shapes(tiny_model)
    if left is None:
        with pytest.raises(PlanError, match=r"^lora\."):
            target_linears(shapes, asked.target_modules, asked.exclude_modules, asked.layers_to_transform)
    else:
        chosen = target_linears(shapes, asked.target_modules, asked.exclude_modules, asked.layers_to_transform)
        assert len(chosen) == left


def test_a_pattern_without_a_target_is_named(tiny_model):
    values = {"model": {"name": str(tiny_model)}, "lora": {"alpha_pattern": {"query": 3.0}}}
    with pytest.raises(PlanError, match=r"lora.alpha_pattern: 'query' matches none of the 14 targets"):
        make_plan(from_dict(values), _shapes(tiny_model), 1, None)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"q_proj": 0}},
        {"variant": "ia3", "rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": [-1]},
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(lora):
    from fsdp_qlora.config.rules import check

    with pytest.raises(ConfigError, match=r"lora\.(rank_pattern|layers_to_transform)"):
        check(from_dict({"model": {"name": "x"}, "lora": lora}))


def test_an_adapter_of_plain_peft_with_regular_expressions_is_read(tiny_model, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.1.*": 2},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 3},
    )  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path)
    read = read_adapter_config(tmp_path)
    settings = read.settings(stored_modules(tmp_path, read))
    found = {name: (of_target(settings, name).r, of_target(settings, name).alpha) for name in settings.target_modules}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 3.0), "model.layers.0.mlp.down_proj": (4, 8.0),
        "model.layers.1.self_attn.q_proj": (2, 8.0), "model.layers.1.mlp.down_proj": (2, 8.0),
    }  # fmt: skip
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    for bad in ({"q_proj": -1}, {"(": 2}, [3], {"q_proj": "2"}):
        file.write_text(json.dumps({**values, "rank_pattern": bad}))
        with pytest.raises(ModelError, match="malformed: rank_pattern="):
            read_adapter_config(tmp_path)
