"""Whatever is typed arrives as it was typed: paths, prompts, lists; through Hydra's grammar, YAML and the shell."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.cli.quoting import command, list_of_names, mapping_of_names, quoted
from fsdp_qlora.errors import ConfigError
from tests.tiers import some_in_full

TEXTS = [
    "plain", "é ø 好", "a,b", "a=b", "(x", "[x", "{x", "x}", "it's", 'say "hi"', "a\\b", "end\\", "\\'", "\\\\'", "'", "''",
    "${oc.env:HOME}", "\\${x}", "${", "$HOME `id` $(id)", "#x", "a: b", "~x", " lead and trail ", "%20", "a;b|c&d", "null",
    "true", "1e3", "?*", "new\nline", "\\\\${y}'\\",
]  # fmt: skip


HARDEST = ["é ø 好", "a,b", "it's", "\\\\'", "${oc.env:HOME}", " lead and trail ", "new\nline", "\\\\${y}'\\"]
"""Those that `make test` composes a whole configuration with."""


@pytest.mark.parametrize("text", TEXTS)
def test_quoted_text_comes_back(text):
    for value in (text, [text, "x", text]):
        parsed = OverridesParser.create().parse_override(f"key={quoted(value)}").value()
        found = OmegaConf.to_container(OmegaConf.create({"key": parsed}), resolve=True)
        assert found == {"key": value}


@pytest.mark.parametrize(
    "name", some_in_full([t for t in TEXTS if t != "${"], HARDEST)
)  # Hydra keeps what no grammar of its own reads
def test_a_config_dir_of_any_name(tmp_path, name):
    folder = tmp_path / name / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment/mine.yaml").write_text("# @package _global_\noptim: {lr: 0.5}\n")
    assert compose_config("train", ["--config-dir", str(folder), "experiment=mine"]).optim.lr == 0.5
    assert compose_config("train", [f"--config-dir={folder}", "experiment=mine"]).optim.lr == 0.5


@pytest.mark.parametrize("text", some_in_full([t for t in TEXTS if t != "null" and not t.startswith("[")], HARDEST))
def test_paths_and_prompts_are_taken_as_typed(text):
    keys = ("prompt", "adapter", "model.name", "data.train", "run.output_root", "export.to", "lora.init_from")
    config = compose_config("generate", [f"{key}={text}" for key in keys])
    assert [config.prompt, config.adapter, config.model.name, config.data.train] == [text] * 4
    assert [config.run.output_root, config.export.to, config.lora.init_from] == [text] * 3


def test_lists_of_paths_keep_a_comma_in_quotes():
    assert list_of_names("[a.jsonl, b c/ ,'d,e.jsonl',\"f'g\"]") == ["a.jsonl", "b c/", "d,e.jsonl", "f'g"]
    assert list_of_names("[]") == []


def test_several_adapters_are_named_on_the_command_line():
    assert mapping_of_names("{a: x y, b-2:'p,q',c : \"r's\"}") == {"a": "x y", "b-2": "p,q", "c": "r's"}
    assert mapping_of_names("{x}") is mapping_of_names("a: b") is mapping_of_names("{a: b, c}") is None
    adapter = "adapter={poet: out/a, coder: '~/b,c'}"
    config = compose_config("generate", [adapter, "prompt=x", "generate.adapter=coder"])
    assert config.adapter == {"poet": "out/a", "coder": "~/b,c"}
    assert config.generate.adapter == "coder"


def test_several_adapters_survive_a_file_of_settings_and_single_keys(tmp_path):
    (tmp_path / "config.yaml").write_text("adapter: {poet: a, coder: b}\n")
    saved = f"run_from={tmp_path}"
    assert compose_config("generate", [saved, "prompt=x"]).adapter == {"poet": "a", "coder": "b"}
    assert compose_config("generate", ["adapter.poet=a", "prompt=x"]).adapter == {"poet": "a"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["adapter={poet: a, coder: b}", "generate.adapter=codr"],
            "'codr' is not one of poet, coder, __base__. Did you",
        ),
        (["adapter=a", "generate.adapter=a"], "generate.adapter: chooses among several adapters"),
        (["adapter={_x: a}"], "'_x' cannot name an adapter"),
    ],
)
def test_wrong_names_of_adapters_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose_config("generate", [*overrides, "prompt=x"])


@pytest.mark.parametrize("text", [t for t in TEXTS if t != "null"])
def test_a_command_can_be_pasted(text):
    line = command("generate", f"adapter={text}", f"prompt={text}").replace("fsdp-qlora", "printf '%s\\0'", 1)
    shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert shown.split("\0")[:-1] == ["generate", f"adapter={text}", f"prompt={text}"]


@pytest.mark.parametrize("key", ["lora.target_modules", "train.sample_prompts", "fsdp.offload_modules", "data.weights"])
def test_a_list_without_brackets_is_explained(key):
    with pytest.raises(ConfigError) as refusal:
        compose_config("train", [f"{key}=q_proj,v_proj"])
    assert shlex.quote(f"{key}=[q_proj,v_proj]") in str(refusal.value)


def test_a_sweep_without_multirun_is_explained():
    with pytest.raises(ConfigError, match=r"optim\.lr: to run once with each value, add --multirun"):
        compose_config("train", ["optim.lr=1,2"])


def test_a_list_of_target_modules_in_one_text_is_explained():
    with pytest.raises(ConfigError, match=r"lora\.target_modules: write a list, '\[q_proj,v_proj\]'"):
        compose_config("train", ["lora.target_modules='q_proj, v_proj'"])
