"""S4, S17, S18: a folder of settings from somewhere sets none of Hydra's own, which would run code."""

from __future__ import annotations

import pytest

from fsdp_qlora.cli.compose import compose_config, hydra_main, split
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
}


@pytest.mark.parametrize("kind", FILES)
def test_a_foreign_folder_reaches_nothing_of_hydras(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    place, text = FILES[kind]
    file = tmp_path / "theirs" / place
    file.parent.mkdir(parents=True)
    canary = tmp_path / "canary"
    file.write_text(text.replace("CANARY", str(canary)))
    words = [f"--config-dir={tmp_path / 'theirs'}", "experiment=x", "model.name=m", "data.train=d"]
    with pytest.raises(SecurityError, match=str(file)):
        hydra_main("plan", split([*words, "-m"]), lambda config: 0)
    with pytest.raises(SecurityError, match=str(file)):
        compose_config("plan", words)
    assert not canary.exists()
    assert SecurityError.exit_code == 77


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
    with pytest.raises(ConfigError, match="not taken"):
        compose_config("plan", ["model.name=m", word])


@pytest.mark.parametrize("name", [".", "a/.", "./a", "..", "a/../b"])
def test_the_folder_of_all_runs_is_no_run(name):
    with pytest.raises(ConfigError, match=r"run\.name"):
        compose_config("plan", ["model.name=m", f"run.name={name}"])
