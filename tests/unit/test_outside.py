"""S6: what settings of others can read from outside, and that messages do not hold it."""

from __future__ import annotations

import hydra.core.utils
import pytest
import yaml
from omegaconf.basecontainer import BaseContainer

from fsdp_qlora.cli.compose import compose_config, hydra_main, split
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.errors import ConfigError, SecurityError

CANARY = "hf_CANARY"
_NAME = "model: {{name: '{}'}}\n"
READS = {
    "a variable": _NAME.format("a/${oc.env:HF_TOKEN}"),
    "with a default": _NAME.format("${oc.env:HF_TOKEN,m}"),
    "as a default": _NAME.format("${oc.env:NOWHERE,${oc.env:HF_TOKEN}}"),
    "decoded": _NAME.format("${oc.decode:${oc.env:HF_TOKEN}}"),
    "decoded later": _NAME.format('${oc.decode:"\\${oc.env:HF_TOKEN}"}'),
    "created": "data: {train: '${oc.create:{a: \"${oc.env:HF_TOKEN}\"}}'}\n",
    "a name put together": "run: {name: env}\nmodel: {name: '${oc.${run.name}:HF_TOKEN}'}\n",
    "a variable's name put together": "run: {name: TOKEN}\nmodel: {name: '${oc.env:HF_${run.name}}'}\n",
    "in a mapping": "data: {columns: {messages: '${oc.env:HF_TOKEN}'}}\n",
    "a number": "optim: {lr: '${oc.env:HF_TOKEN}'}\n",
    "SLURM's own password": _NAME.format("${oc.env:SLURM_JWT}"),
    "another name": _NAME.format("${oc.env:HOME_TOKEN}"),
}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Return a function that writes an experiment and returns the words that choose it."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "SLURM_JWT", "HOME_TOKEN"):
        monkeypatch.setenv(name, CANARY)

    def write(text: str) -> list[str]:
        (tmp_path / "theirs/experiment").mkdir(parents=True)
        (tmp_path / "theirs/experiment/x.yaml").write_text(f"# @package _global_\n{text}")
        return ["--config-dir=theirs", "experiment=x", "data.train=d"]

    return write


@pytest.mark.parametrize("kind", READS)
def test_a_secret_of_the_environment_is_not_read(experiment, kind):
    words = experiment(READS[kind])
    with pytest.raises(SecurityError, match=r"^\$\{oc\.env:[A-Z_]+\}: .*FSDP_QLORA_READABLE_ENV") as refused:
        compose_config("plan", words)
    assert CANARY not in str(refused.value)
    assert SecurityError.exit_code == 77


@pytest.mark.parametrize("flags", [["-m"], ["--cfg", "job", "--resolve"]], ids=["sweep", "shown"])
@pytest.mark.parametrize("key", ["run: {name: ", "model: {name: "])
def test_nor_where_hydra_itself_resolves(experiment, capfd, flags, key):
    """A sweep's folder is named by settings before any job begins."""
    words = experiment(f"{key}'${{oc.env:HF_TOKEN}}'}}\n")
    ran: list[RunConfig] = []
    try:
        code = hydra_main("plan", split([*words, *flags]), lambda config: ran.append(config) or 0)
    except SecurityError as error:
        code = error.exit_code
    assert code == 77 and not ran
    assert CANARY not in "".join(capfd.readouterr())


def test_no_variable_picks_a_file(experiment):
    words = experiment("defaults:\n  - /optim: ${oc.env:HF_TOKEN}\n")
    with pytest.raises(SecurityError, match="in its defaults"):
        compose_config("plan", words)


def test_hydras_own_knowledge_is_not_read(experiment):
    words = experiment(_NAME.format("${hydra:runtime.cwd}"))
    assert hydra_main("plan", split([*words, "-m"]), lambda config: 0) == 77
    with pytest.raises(SecurityError, match=r"hydra:runtime\.cwd"):
        compose_config("plan", words)


def test_a_kept_config_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    settings = to_dict(RunConfig())
    settings["model"]["name"] = settings["data"]["train"] = "a/${oc.env:HF_TOKEN}${oc.env:HOME}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = compose_config("plan", [f"run_from={tmp_path / 'config.yaml'}"])
    assert config.model.name == config.data.train == "a/${oc.env:HF_TOKEN}${oc.env:HOME}"


def test_what_honest_files_need_is_read(experiment, monkeypatch):
    for name, value in {"SCRATCH": "/scratch/me", "SLURM_JOB_ID": "17", "MY_DATA": "rows", "MINE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_QLORA_READABLE_ENV", "MY_DATA, MINE")
    words = experiment(
        "run: {output_root: '${oc.env:SCRATCH}/runs', name: 'job_${oc.env:SLURM_JOB_ID}', seed: '${oc.env:MINE}'}\n"
        "model: {name: '${oc.env:MY_DATA}/m', revision: '${oc.env:WORK,null}'}\n"
    )
    monkeypatch.delenv("WORK", raising=False)
    config = compose_config("plan", words)
    assert (config.run.output_root, config.run.name, config.run.seed) == ("/scratch/me/runs", "job_17", 2)
    assert (config.model.name, config.model.revision) == ("rows/m", None)


WRONG = {
    "a number": "optim: {lr: '${oc.env:MINE}'}\n",
    "a choice": "quant: {name: '${oc.env:MINE}'}\n",
    "a rule": "run: {name: 'a/${oc.env:MINE}'}\n",
    "decoded": "optim: {lr: '${oc.decode:\"[${oc.env:MINE}\"}'}\n",
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("value", ["CANARY 'of' mine\\\n", "CANARY of/mine"])
def test_a_value_that_fails_is_not_repeated(experiment, monkeypatch, kind, value):
    monkeypatch.setenv("MINE", value)
    monkeypatch.setenv("FSDP_QLORA_READABLE_ENV", "MINE")
    with pytest.raises(ConfigError, match="MINE") as refused:
        compose_config("plan", experiment(WRONG[kind]))
    assert "CANARY" not in str(refused.value)


def test_a_variable_that_is_not_set_is_named(experiment, monkeypatch):
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(ConfigError, match=r"oc\.env:SCRATCH\}: the variable is not set"):
        compose_config("plan", experiment(_NAME.format("${oc.env:SCRATCH}")))


def test_there_are_no_resolvers_but_those_we_know():
    """A new one of OmegaConf's or Hydra's is looked at: those here read nothing outside, or are ours by now."""
    hydra.core.utils.setup_globals()
    compose_config("plan", ["model.name=m"])
    ours = {"embedded", "oc.env", "hydra"}
    within = {"oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select"}
    assert set(BaseContainer._resolvers) == ours | within | {"now", "python_version"}
