"""What a model's config.json may be, and what `model.config_overrides` makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.folder import config_for_plan, needs_hub, resolve_folder
from fsdp_qlora.model.skeleton import build_skeleton
from fsdp_qlora.model.tokenizer import build_tokenizer


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def _write(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}))


UNUSABLE = {
    "unknown architecture": ({"model_type": "nosuch"}, "model type `nosuch`"),
    "no architecture": ({"model_type": None}, "Unrecognized model"),
    "no language model": ({"model_type": "vit"}, "AutoModelForCausalLM"),
    "code of its own": (
        {"model_type": "nosuch", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
        "model.trust_remote_code=true",
    ),
    "a text for a number": ({"hidden_size": "wide"}, "hidden_size"),
    "heads that do not divide": ({"hidden_size": 130}, "130"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_built_is_refused_in_one_line(folder, case):
    changes, words = UNUSABLE[case]
    _write(folder, **changes)
    with pytest.raises(ModelError) as refusal:
        build_skeleton(folder, torch.bfloat16, "eager")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_damaged_json_is_refused(folder):
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"config\.json"):
        build_skeleton(folder, torch.bfloat16, "eager")
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        build_tokenizer(folder)


def _frequencies(folder: Path, overrides: dict) -> torch.Tensor:
    model = build_skeleton(folder, torch.float32, "eager", config_overrides=overrides)
    return model.get_submodule("model.rotary_emb").get_buffer("inv_freq").clone()


def test_rope_in_any_spelling_reaches_the_frequencies(folder):
    plain = _frequencies(folder, {})
    exponents = torch.arange(0, 32, 2) / 32
    other = 1.0 / 5e5**exponents
    for overrides in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}):
        torch.testing.assert_close(_frequencies(folder, overrides), other)
    for name in ("rope_scaling", "rope_parameters"):
        for word in ("rope_type", "type"):
            torch.testing.assert_close(_frequencies(folder, {name: {word: "linear", "factor": 4.0}}), plain / 4)
    both = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    torch.testing.assert_close(_frequencies(folder, both), other / 2)


def test_other_keys_and_what_is_refused(folder):
    assert load_config(folder, overrides={"rms_norm_eps": 1e-3}).rms_norm_eps == 1e-3
    assert load_config(folder, overrides={}).rms_norm_eps == load_config(folder).rms_norm_eps
    for overrides, words in {
        "rms_norm_epsilon": ({"rms_norm_epsilon": 1e-3}, "no such key. Did you mean 'rms_norm_eps'?"),
        "type": ({"num_hidden_layers": "two"}, "model.config_overrides: .*num_hidden_layers"),
        "pair": ({"hidden_size": 130}, "model.config_overrides: .*130"),
        "rope": ({"rope_scaling": {"rope_type": "bogus"}}, "bogus"),
    }.values():
        with pytest.raises(ModelError, match=words):
            build_skeleton(folder, torch.bfloat16, "eager", config_overrides=overrides)


def test_parts_of_a_composite_config(tmp_path):
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed = load_config(tmp_path, overrides={"text_config": {"rms_norm_eps": 0.5}})
    assert changed.text_config.rms_norm_eps == 0.5 and changed.text_config.hidden_size == 64
    with pytest.raises(ModelError, match=r"text_config\.hiden_size: Gemma3TextConfig has no such key"):
        load_config(tmp_path, overrides={"text_config": {"hiden_size": 1}})


@pytest.mark.parametrize(("words", "expected"), [
    (["model.config_overrides.rope_theta=1e6"], {"rope_theta": 1e6}),
    (["+model.config_overrides.rope_theta=1e6", "model.config_overrides.a=[1,b]"], {"rope_theta": 1e6, "a": [1, "b"]}),
    (["model.config_overrides={rope_scaling: {rope_type: linear, factor: 2}}"],
     {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
    (["model.config_overrides.rope_scaling.factor=2.5"], {"rope_scaling": {"factor": 2.5}}),
    ([], {}),
])  # fmt: skip
def test_on_the_command_line(words, expected):
    config = compose_config("plan", ["model.name=x", *words])
    assert config.model.config_overrides == expected


def test_columns_on_the_command_line():
    words = ["model.name=x", "data.train=x.jsonl", "data.columns.messages=dialogue"]
    assert compose_config("prepare", words).data.columns == {"messages": "dialogue"}
    with pytest.raises(ConfigError, match=r"data\.columns\.messages: expected text"):
        compose_config("prepare", [*words[:2], "data.columns.messages=[a]"])
    with pytest.raises(ConfigError, match=r"model\.config_overrides: expected a mapping"):
        compose_config("plan", ["model.name=x", "model.config_overrides=3"])


def test_a_name_that_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch):
    """S20: a folder that is missing looks like a name of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/llama-small").mkdir(parents=True)
    for name, said in (
        (
            "models/lama-small",
            "(models exists, but does not contain it. Did you mean 'llama-small'?); then models/lama-small on http",
        ),
        ("nowhere/llama", f"the folder {tmp_path}/nowhere/llama; then nowhere/llama on http"),
        ("gpt2", "; then gpt2 on http"),
    ):
        with pytest.raises(ModelError) as refused:
            resolve_folder(name)
        assert said in str(refused.value) and "is not a local folder, and the hub did not provide it" in str(
            refused.value
        )
    assert needs_hub("Qwen/Qwen3-8B") and not needs_hub("./Qwen/Qwen3-8B")
    assert needs_hub("gpt2") and not needs_hub("models") and not needs_hub("a/b/c") and not needs_hub("")
    with pytest.raises(ModelError, match="there is no folder a/b/c"):
        resolve_folder("a/b/c")


def test_a_model_of_the_hub_without_an_owner_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub/models--gpt2/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub/models--gpt2/refs").mkdir()
    (tmp_path / "hub/models--gpt2/refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert config_for_plan("gpt2") == snapshot
    with pytest.raises(ModelError, match="gpt3 is not a folder, not in the local hub cache"):
        config_for_plan("gpt3")
