"""Settings: composed, checked, kept."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import yaml

from fsdp_qlora.cli.compose import compose_config, hydra_main, split
from fsdp_qlora.cli.generate import run as generate
from fsdp_qlora.cli.help import show
from fsdp_qlora.cli.overrides import GROUPS, conf_dir, group_options
from fsdp_qlora.config.convert import known_keys, to_dict
from fsdp_qlora.config.rules import check, failures
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.errors import ConfigError, SecurityError

SHOWN = ("run", "model", "data", "quant", "lora", "fsdp", "train", "optim", "checkpoint", "launcher")


def test_every_group_file_names_its_schema_and_only_known_keys():
    assert GROUPS
    options = {group: group_options(group) for group in GROUPS}
    for group, names in options.items():
        for name in names:
            values = yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text())
            if group != "track":  # of which several are chosen at once; the root has its schema
                assert values.pop("defaults")[0] == "schema"
            assert {f"{group}.{key}" for key in values} <= set(known_keys(RunConfig))
    for number in range(max(map(len, options.values()))):  # one of each group at a time
        chosen = {group: names[number % len(names)] for group, names in options.items()}
        chosen["quant"] = {"none": "none", "loftq": "nf4"}.get(chosen["lora"], chosen["quant"])  # what they need
        chosen["objective"] = {"eva": "sft"}.get(chosen["lora"], chosen["objective"])
        compose_config("plan", [*(f"{group}={name}" for group, name in chosen.items()), "model.name=x"])


def test_defaults_of_conf_and_of_the_schema_agree():
    composed, plain = to_dict(compose_config("train", [])), to_dict(RunConfig())
    assert composed == plain


def test_a_config_survives_its_own_yaml():
    config = compose_config("train", ["experiment=quickstart", "lora.target_modules=[q_proj,v_proj]"])
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose_config("train", []).optim.lr = 1.0


@pytest.mark.parametrize(
    "text", ["What's up, world (a=b)?", "{x: [1,2]} $HOME ${oc.env:HOME}", 'é\n\t\\ "', "null", "a=b=c", ""]
)
def test_free_text_is_taken_verbatim(text):
    assert compose_config("generate", [f"prompt={text}"]).prompt == text


def test_paths_are_taken_verbatim():
    config = compose_config("train", ["data.train=[a b.jsonl, /x=y/c.jsonl]", "data.eval=null", "model.name=/m o=d/el"])
    assert config.data.train == ["a b.jsonl", "/x=y/c.jsonl"]
    assert config.data.eval is None
    assert config.model.name == "/m o=d/el"


def test_run_from_repeats_a_run_and_the_command_line_wins(tmp_path):
    first = compose_config("train", ["quant=fp4", "optim=sgd", "optim.lr=0.5", "data.train=[a,b]", "lora.r=3"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(first)))
    again = compose_config("train", [f"run_from={file}"])
    assert dataclasses.replace(again, run_from=None) == first
    of_folder = compose_config("train", [f"run_from={tmp_path}"])
    assert dataclasses.replace(of_folder, run_from=None) == first
    other = compose_config("train", [f"run_from={file}", "lora.r=5", "optim=adamw"])
    assert (other.lora.r, other.optim.name, other.optim.lr, other.quant.name) == (5, "adamw", "auto", "fp4")


def test_a_folder_without_a_run_is_no_start(tmp_path):
    with pytest.raises(ConfigError, match=f"run_from: {tmp_path}/config.yaml cannot be read: No such file"):
        compose_config("train", [f"run_from={tmp_path}"])


def test_a_sweep_starts_from_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(compose_config("train", ["lora.r=3"]))))
    words = ["run_from=config.yaml", "model.name=m", "optim.lr=0.5,0.25", "-m"]
    ran: list[RunConfig] = []
    assert hydra_main("plan", split(words), lambda config: ran.append(config) or 0) == 0
    assert [(config.lora.r, config.optim.lr) for config in ran] == [(3, 0.5), (3, 0.25)]


def test_own_yaml_folder(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.125\n")
    assert compose_config("train", ["--config-dir", str(tmp_path), "experiment=mine"]).optim.lr == 0.125


def test_a_choice_that_looks_like_a_bool():
    for choice in ("auto", "false", "true"):
        assert compose_config("train", [f"train.compile={choice}"]).train.compile == choice


def test_fast_paths_that_exclude_each_other_are_refused():
    pairs = (["quant.cache_dequantized=true", "train.activation_checkpointing=full"], "quant.cache_dequantized"), (
        ["train.compile=true", "fsdp.offload=activations"], "train.compile",
    ), (
        ["train.compile=true", "train.kernels=liger"], "train.kernels",
    )  # fmt: skip
    for overrides, key in pairs:
        with pytest.raises(ConfigError, match=key):
            check(compose_config("train", overrides))


def test_all_failures_at_once():
    with pytest.raises(ConfigError) as refusal:
        from_dict({"optim": {"lr": "fast", "lrr": 1}, "train": 3, "quant": {"name": "nf5"}})
    for word in ("optim.lr:", "optim.lrr", "train:", "quant.name", "nf4"):
        assert word in str(refusal.value)


WRONG = {
    "nonsense": "nonsense: expected key=value",
    "model.nmae=x": "model.nmae: there is no such key. Did you mean 'model.name'?",
    "optim.lr=fast": "optim.lr: expected a number, got 'fast'. It may also be auto.",
    "quant=nf5": "quant: 'nf5' is not one of fp4, int8, nf4, none.",
    "train.max_steps=many": "train.max_steps: expected a whole number",
    "train.micro_batch_size=99": "train.micro_batch_size: 99 rows do not fit",
    "data.length_grouped=true": "data.length_grouped: packed sequences",
    "lora.r=0": "lora.r: must be above 0",
    "train.kernels=liger": "train.kernels: compiled layers generate such kernels themselves",
    "plan.gpu=24": "plan.gpu: 24 bytes are not the memory of a device",
    "plan.device=h1000": "plan.device: 'h1000' is unknown. Did you mean 'h100'?",
}
"""Overrides -> what is said of each."""
RIGHT = ["data.packing=true", "train.compile=true", "train.num_epochs=0", "train.global_batch_size=16"]


def test_one_message_names_misspelt_keys_wrong_types_and_broken_rules():
    with pytest.raises(ConfigError) as refusal:
        compose_config("train", [*WRONG, *RIGHT])
    lines = str(refusal.value).splitlines()
    assert all(any(line.startswith(said) for line in lines) for said in WRONG.values())
    # data.train is missing; nothing is said of max_steps and num_epochs, nor of model.name: one is not known, the other
    # was probably meant
    assert len(lines) == len(WRONG) + 1 and lines[-1].startswith("data.train: not set")


def test_rules_are_checked_beside_a_wrong_experiment_and_a_sweep(monkeypatch):
    with pytest.raises(ConfigError) as refusal:
        compose_config("train", ["experiment=quickstrat", "train.num_epochs=0", "train.max_steps=0", "lora.alpha=-1"])
    keys = [line.partition(":")[0] for line in str(refusal.value).splitlines()]
    assert keys == ["experiment", "lora.alpha", "train.max_steps"]  # not model.name and data.train: it sets them
    line = ["--multirun", "optim.lr=1e-3,1e-4", "lora.r=big", "lora.alpha=-1", "model.name=x", "data.train=y"]
    monkeypatch.setattr(sys, "argv", ["fsdp-qlora"])
    with pytest.raises(ConfigError) as refusal:
        hydra_main("train", split(line), lambda config: 0)
    assert [line.partition(":")[0] for line in str(refusal.value).splitlines()] == ["lora.r", "lora.alpha"]


def test_wrong_values_in_a_file_and_broken_rules_are_named_together(tmp_path):
    wrong = {"optim": {"lr": "fast"}, "lora": {"r": 0, "alhpa": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError) as refusal:
        compose_config("train", [f"run_from={tmp_path}", "train.micro_batch_size=99", "train.global_batch_size=16"])
    strange, *others = str(refusal.value).splitlines()
    assert strange == f"{tmp_path}: lora.alhpa: there is no such key. Did you mean 'lora.alpha'?"
    keys = [line.partition(":")[0] for line in others]
    assert keys == ["optim.lr", "lora.r", "train.micro_batch_size", "model.name", "data.train"]


PLAIN = [
    "train.compile=true", "train.kernels=compile", "train.kernels=liger", "quant.cache_dequantized=true",
    "fsdp.reshard_after_forward=false", *(f"model.attn_implementation={name}" for name in (
        "flash_attention_2", "flex_attention", "blockwise", "varlen")),
]  # fmt: skip


@pytest.mark.parametrize("fast", PLAIN)
def test_debug_plain_refuses_what_it_turns_off(fast):
    key, _, value = fast.partition("=")
    with pytest.raises(ConfigError, match=rf"^{key}: {value} is a fast path, and debug=plain"):
        compose_config("train", ["debug=plain", fast])
    assert not [line for line in failures(compose_config("train", ["debug=plain"])) if key in line]
    compose_config("train", ["debug=plain", "train.compile=false", "model.attn_implementation=sdpa"])


def test_nothing_heavy_is_imported_by_composing():
    code = (
        "import sys; from fsdp_qlora.cli.compose import compose_config; compose_config('train', ['optim.lr=1']);"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'wandb') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_formats_by_pattern_come_through_the_command_line_and_back(tmp_path):
    """Patterns have dots and stars, which are no path of keys."""
    wanted = {"*.down_proj": "int8", "model.layers.0.*": "none"}
    text = "quant.overrides={*.down_proj:int8,model.layers.0.*:none}"
    config = compose_config("train", ["model.name=x", "data.train=y", text])
    assert config.quant.overrides == wanted
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)))
    assert compose_config("train", [f"run_from={saved}"]).quant.overrides == wanted


def test_help_has_a_line_for_each_key_and_imports_nothing_heavy():
    shown = show("train", "train")
    assert all(f"  {key}=" in shown for key in known_keys(RunConfig) if "." in key and key.split(".")[0] in SHOWN)
    assert "lora.r=16" in show("plan", "plan", "lora") and "one of nf4, fp4, int8, " in show("plan", "plan", "quant")
    with pytest.raises(ConfigError, match="Did you mean 'quant'"):
        show("train", "train", "quantt")


def test_a_saved_config_is_loaded_without_hydra_and_lets_no_code_run(tmp_path):
    """S5, S6: what lets code run counts as an argument alone; an interpolation stays text."""
    config = from_dict({"model": {"name": "${oc.env:HOME}"}, "optim": {"lr": 1e-3}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert RunConfig.load(tmp_path) == RunConfig.load(tmp_path / "config.yaml") == config
    values = to_dict(config) | {"model": {"name": "m", "trust_remote_code": True}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SecurityError, match=r"model\.trust_remote_code"):
        RunConfig.load(tmp_path / "other.yaml")
    assert RunConfig.load(tmp_path / "other.yaml", trust_remote_code=True).model.trust_remote_code


def test_an_empty_prompt_is_blamed_on_the_key_that_gave_it(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(" \n")
    for key, value in (("prompt", " "), ("prompt_file", str(file))):
        with pytest.raises(ConfigError, match=rf"^{key}: .*is empty"):
            generate(from_dict({key: value}))
