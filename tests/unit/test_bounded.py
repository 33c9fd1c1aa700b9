"""S19: small files of strangers that stand for more than any machine holds end at once, with 2."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, ModelError, SecurityError
from fsdp_qlora.files.bounded import OutOfBoundsError, require_bounded_values
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.construct import parameters_on_meta
from fsdp_qlora.model.skeleton import build_skeleton
from fsdp_qlora.model.tokenizer import build_tokenizer
from fsdp_qlora.shapes.known import SHAPES
from tests.families import SMALL


def _tower(first: str, each: str) -> str:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} " + each.format(", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 12)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "aliases": _tower("x", "[{}]"),
    "merged": _tower("{k: v}", "{{<<: [{}]}}"),
    "a long text again and again": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 10_000)}]\n",
    "itself": "a: &a {b: *a}\n",
    "itself, further down": "a: &a [1, [2, [3, *a]]]\n",
    "deep": "a: " + "[" * 100_000,
    "deep, in braces": "a: " + "{a: " * 100_000,
    "many": "a: [" + "[], " * 400_000 + "]\n",
    "long": "a: " + "x" * 5_000_000 + "\n",
    "a number in sixties": "a: " + "1:" * 200_000 + "1\n",
    "a number that says so": "a: !!int '" + "1:" * 200_000 + "1'\n",
}
ODD = {
    "a date that there is not": "a: 2001-99-99\n",
    "a number of 5000 digits": "a: " + "9" * 900 + "\nb: " + "9" * 5000 + "\n",
    "a number without digits": "a: 0b_\n",
    "a truth that is none": "a: !!bool 3\n",
    "no text": b"a: \xff\xfe\n",
}


def _write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("kind", BOMBS)
def test_settings_that_stand_for_too_much_end_at_once(tmp_path, kind):
    file = _write(tmp_path / "theirs/experiment/x.yaml", BOMBS[kind])
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"run_from: {file} exceeds the limits for settings"):
        compose_config("plan", [f"run_from={file}"])
    with pytest.raises(ConfigError, match=f"--config-dir: {file} exceeds the limits for settings"):
        compose_config("plan", [f"--config-dir={tmp_path / 'theirs'}", "experiment=x"])
    assert time.monotonic() - start < 30, "each takes a second or two; what it stands for never ends"


def test_what_has_no_end_is_not_read_to_it():
    with pytest.raises(SecurityError, match="/dev/zero is not a regular file"):
        compose_config("plan", ["run_from=/dev/zero"])


@pytest.mark.parametrize("kind", ODD)
def test_odd_settings_are_one_line(tmp_path, kind):
    file = _write(tmp_path / "experiment/x.yaml", ODD[kind])
    for words in ([f"run_from={file}"], [f"--config-dir={tmp_path}", "experiment=x"]):
        with pytest.raises(ConfigError, match="experiment/x"):
            compose_config("plan", words)


def test_honest_settings_are_taken_with_aliases_and_many_files(tmp_path):
    settings = to_dict(RunConfig())
    settings["data"]["train"] = [f"/some/where/part_{n:05}.jsonl" for n in range(5_000)]
    file = _write(tmp_path / "config.yaml", yaml.safe_dump(settings))
    assert len(compose_config("plan", [f"run_from={file}", "model.name=m"]).data.train) == 5_000
    text = "# @package _global_\ntrain: {sample_prompts: &p [a, b]}\nlora: {target_modules: *p}\n"
    _write(tmp_path / "theirs/experiment/x.yaml", text)
    config = compose_config("plan", [f"--config-dir={tmp_path / 'theirs'}", "experiment=x", "model.name=m"])
    assert config.lora.target_modules == config.train.sample_prompts == ["a", "b"]


MANY = 10**9
CONFIGS = {
    "layers": {"num_hidden_layers": MANY},
    "layers with their kinds": {"model_type": "gemma3_text", "num_hidden_layers": MANY},
    "layers of another name": {"model_type": "gpt2", "n_layer": MANY},
    "layers of a decoder": {"model_type": "t5", "num_decoder_layers": MANY},
    "layers of a part": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": MANY}},
    "layers as a float": {"num_hidden_layers": 1e9},
    "positions": {"max_position_embeddings": MANY},
    "positions of another name": {"model_type": "gpt2", "n_positions": MANY},
    "experts": {"model_type": "mixtral", "num_local_experts": MANY},
    "labels": {"num_labels": MANY},
    "a width": {"head_dim": MANY},
    "a list": {"model_type": "funnel", "block_sizes": [MANY]},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_models_config_with_numbers_of_no_model_ends_at_once(tmp_path, kind):
    _write(tmp_path / "config.json", json.dumps({"model_type": "llama", **SMALL, **CONFIGS[kind]}))
    start = time.monotonic()
    for build in (load_config, build_tokenizer):
        with pytest.raises(ModelError, match=r"cannot be built: \w+ in its config is 1e\+09"):
            build(tmp_path)
    assert time.monotonic() - start < 5


def test_so_do_overrides_of_it(tmp_path):
    _write(tmp_path / "config.json", json.dumps({"model_type": "llama", **SMALL}))
    with pytest.raises(ModelError, match="num_hidden_layers in its config"):
        load_config(tmp_path, False, {"num_hidden_layers": MANY})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "x" * (17 << 20)], ids=["lists", "objects", "long"])
def test_a_config_that_is_deep_or_long_is_one_line(tmp_path, text):
    _write(tmp_path / "config.json", text)
    with pytest.raises(ModelError, match=r"cannot be built: config\.json is"):
        load_config(tmp_path)


def test_what_the_table_of_keys_does_not_know_has_an_end_too(tmp_path):
    """A layer of remote code may have any number of parts."""
    with parameters_on_meta(most=3), pytest.raises(ValueError, match="more than 3 parameters"):
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(MANY)))
    with parameters_on_meta(most=4):
        assert nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))[1].bias.is_meta


def test_a_buffer_that_no_memory_holds_is_one_line(tmp_path):
    settings = {"model_type": "gpt_neo", "max_position_embeddings": 1 << 24, "num_layers": 1, "hidden_size": 64}
    settings |= {"attention_types": [[["global"], 1]], "num_heads": 4}
    _write(tmp_path / "config.json", json.dumps(settings))
    with pytest.raises(ModelError, match=r"cannot be built: .*memory"):
        build_skeleton(tmp_path, torch.float32, "eager")


def test_known_models_are_within_the_bounds():
    files = sorted(SHAPES.glob("*-*.json"))
    assert len(files) > 20
    for file in files:
        require_bounded_values(json.loads(file.read_text()))


@pytest.mark.full
def test_upstreams_defaults_are_within_the_bounds():
    seen = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            values = kind().to_dict()
        except Exception:  # some have no defaults
            continue
        require_bounded_values(values)
        seen += 1
    assert seen > 100


def test_a_number_is_named_with_its_bound():
    with pytest.raises(OutOfBoundsError, match=r"num_experts in its config is 1e\+09, but the limit is 16384"):
        require_bounded_values({"text_config": [{"num_experts": MANY}]})
    with pytest.raises(OutOfBoundsError, match="but the limit is 1024"):
        require_bounded_values({"num_hidden_layers": 10**400})
