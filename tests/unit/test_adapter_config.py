"""Settings of somebody's adapter: honoured, harmless, or refused by name with exit code 2."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from peft import BOFTConfig, LoraConfig, MissConfig, OFTConfig, VeraConfig
from safetensors.torch import save_file

from fsdp_qlora.adapters.folder import adapted_modules, blamed_on_adapter, read_adapter_config, stored_modules
from fsdp_qlora.errors import FsdpQloraError, ModelError, PlanError


def _folder(tmp_path, **settings):
    LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return tmp_path


HARMLESS = [
    {}, {"lora_dropout": 0.3, "inference_mode": True, "task_type": None, "peft_version": "9.9"}, {"use_rslora": True},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"layers_to_transform": [0]}, {"fan_in_fan_out": True},
    {"exclude_modules": ["k_proj"]}, {"target_modules": ".*q_proj"}, {"target_modules": "all-linear"}, {"revision": "main"},
    {"some_new_key": None, "another": False, "third": [], "fourth": {}}, {"lora_alpha": 6.5},
]  # fmt: skip


@pytest.mark.parametrize("settings", HARMLESS)
def test_what_is_honoured_or_changes_nothing_is_read(tmp_path, settings):
    found = read_adapter_config(_folder(tmp_path, **settings))
    assert (found.r, found.alpha) == (4, settings.get("lora_alpha", 6.0))
    assert found.settings(["a"]).variant == ("rslora" if settings.get("use_rslora") else "lora")
    assert found.revision == settings.get("revision")


REFUSED = {
    "bias": "all",
    "modules_to_save": ["lm_head"], "init_lora_weights": "pissa_niter_16", "layer_replication": [[0, 2], [1, 2]],
    "trainable_token_indices": {"model.embed_tokens": [1], "lm_head": [2]}, "lora_bias": True, "use_qalora": True,
    "target_parameters": "experts.gate_up_proj",
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 1}, "use_bdlora": {"x": 1}, "not_yet_known": 3,
    "not_yet_known_either": True, "new_scaling": "cosine",
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_result_is_refused_by_name(tmp_path, key):
    with pytest.raises(ModelError, match=f"{key}=") as refusal:
        read_adapter_config(_folder(tmp_path, **{key: REFUSED[key]}))
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("indices", [[260, 261], {"model.embed_tokens": [260, 261], "lm_head": [260, 261]}])
def test_ids_of_added_tokens_are_read(tmp_path, indices):
    assert read_adapter_config(_folder(tmp_path, trainable_token_indices=indices)).token_ids == (260, 261)


@pytest.mark.parametrize("indices", [1, [-1], [True], ["a"], {"lm_head": 1}, {"lm_head": [1], "embed_tokens": None}])
def test_malformed_ids_of_added_tokens_are_refused(tmp_path, indices):
    with pytest.raises(ModelError, match="trainable_token_indices=") as refusal:
        read_adapter_config(_folder(tmp_path, trainable_token_indices=indices))
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("value", ["pissa", "olora", "corda", "loftq", "lora_ga", "mystery", 1])
def test_starts_that_change_the_base_are_refused(tmp_path, value):
    with pytest.raises(ModelError, match="init_lora_weights="):
        read_adapter_config(_folder(tmp_path, init_lora_weights=value))


def test_all_are_named_at_once(tmp_path):
    with pytest.raises(ModelError, match=r"lora_bias=true, bias=|bias=.*lora_bias=true"):
        read_adapter_config(_folder(tmp_path, lora_bias=True, bias="all"))


def test_switches_of_lora_are_read_together(tmp_path):
    settings = read_adapter_config(_folder(tmp_path, use_dora=True, use_rslora=True)).settings(["a"])
    assert settings.method == "dora" and settings.scales_by_root


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq"])
def test_a_start_from_the_base_is_read_with_what_it_took_off(tmp_path, start):
    folder = _folder(tmp_path, init_lora_weights=start, loftq_config={"loftq_bits": 4, "loftq_iter": 3})
    (folder / "initial_adapter.safetensors").touch()
    settings = read_adapter_config(folder).settings(["a"])
    assert settings.start == start and settings.method == "lora"
    assert settings.loftq_iter == (3 if start == "loftq" else 1)


@pytest.mark.parametrize(
    ("config", "variant", "options"),
    [
        (LoraConfig(use_dora=True, r=4), "dora", {}),
        (OFTConfig(oft_block_size=16), "oft", {"oft_block_size": 16}),
        (VeraConfig(r=4, projection_prng_key=3), "vera", {"projection_prng_key": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_methods_of_peft_are_read_with_their_options(tmp_path, config, variant, options):
    config.target_modules = {"q_proj"}
    config.save_pretrained(str(tmp_path))
    settings = read_adapter_config(tmp_path).settings(["q_proj"])
    assert settings.variant == variant and options.items() <= settings.options.items()


@pytest.mark.parametrize("config", [OFTConfig(coft=True), MissConfig(init_weights="bat"), BOFTConfig()])
def test_what_a_method_of_peft_does_not_compute_here_is_refused(tmp_path, config):
    config.target_modules = {"q_proj"}
    config.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"coft=true|init_weights=|not an adapter of a method known here"):
        read_adapter_config(tmp_path)


def test_every_key_of_peft_at_its_default_is_read(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {f.name for f in fields(LoraConfig)} - {"runtime_config"} <= written.keys()
    read_adapter_config(tmp_path)


MALFORMED = ["", "{", "[]", '"x"', '{"peft_type": "BOFT"}', '{"peft_type": "LORA", "r": "8"}', '{"peft_type": "LORA", "r": 0}',
             '{"peft_type": "LORA", "lora_alpha": null}', '{"peft_type": "LORA", "base_model_name_or_path": 3}', "\xff"]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_config_is_one_line(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"^adapter: ") as refusal:
        read_adapter_config(tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_adapted_modules_are_those_of_the_file(tmp_path):
    """So PEFT's ways to choose them (patterns, layers, exclusions) need not be done again."""
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {stem.format(layer, side): torch.zeros(1) for layer in (1, 3) for side in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert stored_modules(tmp_path) == ["model.layers.1.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]


@pytest.mark.parametrize("odd", ["lm_head.weight", "embed.lora_embedding_A", "q_proj.bias"])
def test_tensors_that_are_no_lora_matrices_are_refused_by_name(tmp_path, odd):
    with pytest.raises(ModelError, match=odd):
        adapted_modules(["base_model.model.q.lora_A.weight", f"base_model.model.{odd}"], tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        stored_modules(tmp_path)


def test_a_refusal_names_the_adapter_and_no_key_that_nobody_set(tmp_path):
    said = blamed_on_adapter(PlanError("lora.target_modules: 'x' matches none of the model's 14 linears"), tmp_path)
    assert str(said).startswith(f"adapter: {tmp_path}") and "lora." not in str(said) and said.exit_code == 2
    other = FsdpQloraError("model.name: is missing")
    assert blamed_on_adapter(other, tmp_path) is other
