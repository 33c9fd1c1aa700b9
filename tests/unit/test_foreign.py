"""S4, S5, S17, S18: settings from somewhere set none of Hydra's own, which would run code, and let no code run."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from fsdp_qlora.cli.compose import compose_config, hydra_main, split
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, SecurityError

CODE = "{evil: {_target_: os.mkdir, path: CANARY}}"
FILES = {
    "callbacks": ("experiment/x.yaml", f"# @package _global_\nhydra:\n  callbacks: {CODE}\n"),
    "logging": ("experiment/x.yaml", "# @package _global_\nhydra:\n  job_logging: {version: 1, '()': os.mkdir}\n"),
    "environment": ("experiment/x.yaml", "# @package _global_\nhydra: {job: {env_set: {PYTHONPATH: /tmp/evil}}}\n"),
    "a package": ("experiment/x.yaml", f"# @package hydra.callbacks\nevil: {CODE}\n"),
    "a dotted key": ("experiment/x.yaml", f"# @package _global_\nhydra.callbacks: {CODE}\n"),
    "a group of Hydra's": ("hydra/callbacks/x.yaml", f"evil: {CODE}\n"),
    "defaults": ("experiment/x.yaml", "# @package _global_\ndefaults:\n  - override /hydra/callbacks: x\n"),
    "a place in defaults": ("experiment/x.yaml", "# @package _global_\ndefaults:\n  - /run@hydra.callbacks: x\n"),
    "another ending": ("hydra/job_logging/x.yml", "version: 1\n"),
    "a tag that Hydra alone takes": ("experiment/x.yaml", f"# @package _global_\nhydra: {{callbacks: {CODE}}}\nrun: {{name: !!python/object/apply:pathlib.PosixPath [a]}}\n"),
    "a line that YAML alone ends": ("experiment/x.yaml", f"# @a b\u2028# @package hydra.callbacks\nevil: {CODE}\n"),
    "merged": ("experiment/x.yaml", f"# @package _global_\nz: &z {{hydra: {{callbacks: {CODE}}}}}\n<<: *z\n"),
    "a file beside the folder": ("experiment/x.yaml", "# @package _global_\ndefaults:\n  - /../beside/evil\n"),
    "a file anywhere": ("experiment/x.yaml", "# @package _global_\ndefaults:\n  - /BESIDE/evil\n"),
    "a list from elsewhere": ("experiment/x.yaml", "# @package _global_\nd: [/../beside/evil]\ndefaults: ${d}\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_foreign_folder_reaches_nothing_of_hydras(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    place, text = FILES[kind]
    file = tmp_path / "theirs" / place
    file.parent.mkdir(parents=True)
    canary = tmp_path / "canary"
    file.write_text(text.replace("CANARY", str(canary)).replace("BESIDE", str(tmp_path / "beside")))
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/evil.yaml").write_text(
        f"# @package hydra.callbacks\nevil: {CODE}\n".replace("CANARY", str(canary))
    )
    words = [f"--config-dir={tmp_path / 'theirs'}", "experiment=x", "model.name=m", "data.train=d"]
    with pytest.raises(SecurityError, match=str(file)):
        hydra_main("plan", split([*words, "-m"]), lambda config: 0)
    with pytest.raises(SecurityError, match=str(file)):
        compose_config("plan", words)
    assert not canary.exists()
    assert SecurityError.exit_code == 77


def test_a_foreign_folder_goes_nowhere_by_a_link(tmp_path):
    """S4: Hydra would follow it to files that nothing has looked at."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/experiment").symlink_to(tmp_path / "beside")
    with pytest.raises(SecurityError, match="is a link to a folder"):
        compose_config("plan", [f"--config-dir={tmp_path / 'theirs'}", "model.name=m"])


def test_an_honest_folder_is_taken(tmp_path):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\ndefaults:\n  - override /optim: sgd\n\nrun: {name: hydra}\n")
    config = compose_config("plan", [f"--config-dir={tmp_path}", "experiment=mine", "model.name=hydra/net"])
    assert (config.run.name, config.optim.name) == ("hydra", "sgd")


@pytest.mark.parametrize(
    "word",
    ["hydra.searchpath=[pkg://evil]", "hydra.callbacks.x._target_=os.mkdir", "+hydra.job.env_set.PYTHONPATH=/tmp",
     "hydra.launcher._target_=os.mkdir", "hydra/job_logging=evil"],
)  # fmt: skip
def test_few_of_hydras_own_settings_are_taken(word):
    with pytest.raises(ConfigError, match="not accepted"):
        compose_config("plan", ["model.name=m", word])


_MODEL, _DATA = "model.trust_remote_code", "data.allow_code"
_ON = {
    "an experiment": ("experiment/x.yaml", "# @package _global_\nmodel: {trust_remote_code: true}\n", "experiment=x", _MODEL),
    "data": ("experiment/x.yaml", "# @package _global_\ndata: {allow_code: true, row_function: 'os:mkdir'}\n", "experiment=x", _DATA),
    "tasks": ("experiment/x.yaml", "# @package _global_\nevaluate: {tasks: [t], task_path: t}\n", "experiment=x", "evaluate.task_path"),
    "a word": ("experiment/x.yaml", "# @package _global_\nmodel: {trust_remote_code: 'yes'}\n", "experiment=x", _MODEL),
    "a reference": ("experiment/x.yaml", "# @package _global_\nmodel: {trust_remote_code: '${quant.double_quant}'}\n", "experiment=x", _MODEL),
    "a group": ("model/x.yaml", "name: m\ntrust_remote_code: true\n", "model=x", _MODEL),
    "a group of others": ("optim/x.yaml", "# @package model\ntrust_remote_code: true\n", "optim=x", _MODEL),
    "a file under a file": ("model/x.yaml", "defaults: [y]\n", "model=x", _MODEL),
}  # fmt: skip


@pytest.mark.parametrize("kind", _ON)
def test_a_foreign_folder_lets_no_code_run(tmp_path, monkeypatch, kind):
    """S5: what lets code run is typed, or it is refused with what to type."""
    monkeypatch.chdir(tmp_path)
    place, text, word, key = _ON[kind]
    for name, content in ((place, text), ("model/y.yaml", "trust_remote_code: true\n")):
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text(content)
    words = ["--config-dir=theirs", word, "model.name=m", "data.train=d"]
    value = "t" if key == "evaluate.task_path" else "true"
    with pytest.raises(SecurityError, match=rf"{key}: set in --config-dir=theirs.* command line: {key}={value}$"):
        compose_config("plan", words)
    compose_config("plan", [*words, f"++{key}={value}"])


def test_a_sweep_over_a_foreign_folder_lets_no_code_run(tmp_path, monkeypatch):
    """S5: in each job of a sweep, too."""
    monkeypatch.chdir(tmp_path)
    place, text, word, key = _ON["an experiment"]
    (tmp_path / "theirs" / place).parent.mkdir(parents=True)
    (tmp_path / "theirs" / place).write_text(text)
    words = ["--config-dir=theirs", word, "model.name=m", "data.train=d", "-m"]
    ran: list[RunConfig] = []
    assert hydra_main("plan", split([*words, "run.seed=1,2"]), lambda config: ran.append(config) or 0) == 77
    assert not ran
    assert hydra_main("plan", split([*words, f"{key}=false,true"]), lambda config: ran.append(config) or 0) == 0
    assert [config.model.trust_remote_code for config in ran] == [False, True]


def test_a_kept_config_lets_no_code_run(tmp_path):
    """S5: by run_from, too; both keys at once, and a file that sets neither needs nothing."""
    settings = to_dict(dataclasses.replace(RunConfig(), run_from=None))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    compose_config("train", [f"run_from={file}", "model.name=m"])
    settings["model"]["trust_remote_code"] = settings["data"]["allow_code"] = True
    file.write_text(yaml.safe_dump(settings))
    words = [f"run_from={file}", "model.name=m", "data.row_function=a:b"]
    with pytest.raises(SecurityError, match=f"{_MODEL} and {_DATA}: .*command line: {_MODEL}=true {_DATA}=true$"):
        compose_config("train", words)
    with pytest.raises(SecurityError, match=f"^{_DATA}: set in run_from="):
        compose_config("train", [*words, f"{_MODEL}=true"])
    assert compose_config("train", [*words, f"{_MODEL}=true", f"{_DATA}=true"]).data.allow_code
    assert not compose_config(
        "train", [*words, f"{_MODEL}=false", f"{_DATA}=false", "data.row_function=null"]
    ).data.allow_code
    settings["model"]["trust_remote_code"] = settings["data"]["allow_code"] = False
    settings["export"]["llama_cpp"] = "theirs"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(
        SecurityError, match=r"^export\.llama_cpp: .*the converters in theirs.*export\.llama_cpp=theirs$"
    ):
        compose_config("export", [*words, "data.row_function=null"])
    typed = compose_config("export", [*words, "data.row_function=null", "export.llama_cpp=mine", "export.to=x",
                                      "what=gguf"])  # fmt: skip
    assert typed.export.llama_cpp == "mine"


@pytest.mark.parametrize("name", [".", "a/.", "./a", "..", "a/../b"])
def test_the_folder_of_all_runs_is_no_run(name):
    with pytest.raises(ConfigError, match=r"run\.name"):
        compose_config("plan", ["model.name=m", f"run.name={name}"])
