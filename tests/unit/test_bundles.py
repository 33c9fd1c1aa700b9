"""The variants of LoRA are bundles of PEFT's switches; what contradicts them, or cannot be computed, exits with 2."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsdp_qlora.checkpoint.resume import blocking_settings, without
from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.config import choices
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import LoraSettings, RunConfig, from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.errors import ConfigError, PlanError
from fsdp_qlora.run.decide import plan_for

SWITCHES = [
    ({"variant": "rslora"}, "rslora", None, True),
    ({"use_rslora": True}, "rslora", None, True),
    ({"variant": "dora", "init_lora_weights": "pissa"}, "dora", "pissa", False),
    ({"variant": "pissa", "use_dora": True}, "dora", "pissa", False),
    ({"variant": "pissa", "init_lora_weights": "pissa_niter_8"}, "lora", "pissa_niter_8", False),
    ({"variant": "rslora", "init_lora_weights": "loftq"}, "rslora", "loftq", True),
    ({"variant": "dora", "use_rslora": True}, "dora", None, True),
    ({"variant": "olora", "init_lora_weights": "OLoRA"}, "lora", "olora", False),
    ({"init_lora_weights": "true"}, "lora", None, False),
    ({"variant": "vera"}, "vera", None, False),
]
"""Settings -> method, start, and whether it is scaled by the root of r."""


@pytest.mark.parametrize(("lora", "method", "start", "root"), SWITCHES, ids=str)
def test_variants_and_switches_combine(lora, method, start, root):
    config = from_dict({"lora": lora})
    assert (config.lora.method, config.lora.start, config.lora.scales_by_root) == (method, start, root)
    assert not failures(config)


@pytest.mark.parametrize("name", [*choices.METHODS.shipped, *choices.STARTS])
def test_a_group_means_its_variant(name):
    base = ["model.name=x", "data.train=y"]
    assert compose_config("train", [*base, f"lora={name}"]).lora.method == LoraSettings(variant=name).method
    chosen, set_alone = (compose_config("train", [*base, f"{key}={name}"]).lora for key in ("lora", "lora.variant"))
    defaults = LoraSettings()
    assert replace(chosen, r=1, alpha=1.0) == replace(set_alone, r=1, alpha=1.0)
    assert (chosen.variant, chosen.use_dora) == (name, defaults.use_dora)


CONTRADICTIONS = [
    ({"variant": "rslora", "use_rslora": False}, "lora.use_rslora: false contradicts lora.variant=rslora"),
    ({"variant": "dora", "use_dora": False}, "lora.use_dora: false contradicts lora.variant=dora"),
    (
        {"variant": "pissa", "init_lora_weights": "olora"},
        "lora.init_lora_weights: olora contradicts lora.variant=pissa",
    ),
    ({"variant": "loftq", "init_lora_weights": "true"}, "lora.init_lora_weights: true contradicts lora.variant=loftq"),
    ({"variant": "vera", "use_dora": True}, "lora.use_dora: vera has no such switch"),
    ({"variant": "ia3", "init_lora_weights": "pissa"}, "lora.init_lora_weights: ia3 has no such switch"),
    ({"init_lora_weights": "pisa"}, "lora.init_lora_weights: 'pisa' is not one of true, pissa, "),
    ({"init_lora_weights": "pissa_niter_0"}, "lora.init_lora_weights: 'pissa_niter_0' is not one of "),
    ({"loftq_iter": 5}, "lora.loftq_iter: counts the alternations of LoftQ"),
    ({"variant": "pissa", "init_from": "folder"}, "lora.init_from: "),
]


@pytest.mark.parametrize(("lora", "said"), CONTRADICTIONS, ids=str)
def test_what_contradicts_is_refused(lora, said):
    messages = failures(from_dict({"lora": lora}))
    assert len(messages) == 1 and messages[0].startswith(said)


def test_loftq_without_quantization_is_refused():
    (said,) = failures(from_dict({"lora": {"variant": "loftq"}, "quant": {"name": "none"}}))
    assert said.startswith(
        "lora.init_lora_weights: loftq starts from what quantization loses, and quant=none loses nothing"
    )


def test_what_an_export_of_a_start_needs():
    with pytest.raises(ConfigError, match=r"export\.to: not set"):
        check_verb("export", from_dict({"export": {"plain_lora": True}}))
    with pytest.raises(ConfigError, match=r"export\.plain_lora: converts an adapter"):
        values = {"what": "base-4bit", "adapter": "a", "export": {"plain_lora": True, "to": "b"}}
        check_verb("export", from_dict(values))
    check_verb("export", from_dict({"what": "base-4bit", "adapter": "a", "export": {"to": "b"}}))


def _plan(lora, model="Qwen/Qwen2.5-0.5B", quant=None):
    values = {"model": {"name": model}, "lora": lora, "quant": quant or {}, "launcher": {"device": "cpu"}}
    return plan_for(from_dict(values), 2)


def test_the_plan_counts_what_a_start_needs():
    costs = {name: _plan({"init_lora_weights": name}) for name in ("true", "pissa", "pissa_niter_4", "olora", "loftq")}
    assert costs["true"].start is None and "loading" not in costs["true"].moments
    for name in ("pissa", "pissa_niter_4", "olora", "loftq"):
        plan = costs[name]
        assert plan.start is not None and plan.start.matrices == len(plan.targets)
        fixed = plan.bytes
        held = fixed.base_packed + fixed.base_statistics + fixed.base_kept + fixed.adapters
        assert plan.moments["loading"] == held + plan.start.bytes
        assert plan.bytes == costs["true"].bytes
    assert costs["pissa_niter_4"].start.operations < 0.05 * costs["pissa"].start.operations
    whole = 4 * 4864 * 896  # the largest weight in float32
    assert all(costs[name].start.bytes >= whole for name in ("pissa", "pissa_niter_4", "olora", "loftq"))


@pytest.mark.parametrize("name", ["pissa", "loftq"])
def test_a_large_exact_svd_asks_for_confirmation(name):
    large = "Qwen/Qwen2.5-14B"  # hidden 5,120
    with pytest.raises(PlanError, match=r"lora\.init_lora_weights: .*5120.*lora\.allow_large_svd=true") as refusal:
        _plan({"init_lora_weights": name}, large)
    assert refusal.value.exit_code == 2
    assert ("pissa_niter_4" in str(refusal.value)) == (name == "pissa")
    _plan({"init_lora_weights": name, "allow_large_svd": True}, large)
    _plan({"init_lora_weights": "pissa_niter_4"}, large)
    _plan({"init_lora_weights": "olora"}, large)


def test_targets_that_do_not_fit_a_start_are_named():
    with pytest.raises(PlanError, match=r"lora\.r: 300 is above the smaller side of .*k_proj \[128, 896\]"):
        _plan({"init_lora_weights": "pissa", "r": 300})
    with pytest.raises(PlanError, match=r"loftq starts from what quantization loses, and .*v_proj stays in 16 bits"):
        _plan({"variant": "loftq"}, quant={"overrides": {"*.v_proj": "none"}})


def test_settings_that_older_checkpoints_lack_block_no_resume():
    now = blocking_settings(to_dict(RunConfig()))
    for key in (
        "lora.use_rslora",
        "lora.use_dora",
        "lora.init_lora_weights",
        "lora.loftq_iter",
        "lora.allow_large_svd",
    ):
        assert key not in now
    set_now = blocking_settings(to_dict(from_dict({"lora": {"variant": "loftq", "loftq_iter": 3}})))
    assert set_now["lora.loftq_iter"] == 3
    assert without(set_now, []) != without(now, [])
