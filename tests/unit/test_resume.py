"""What a resumed, restarted or stopped run says of what it goes on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fsdp_qlora.checkpoint.manifest import compare
from fsdp_qlora.checkpoint.resume import blocking_settings, identity_of
from fsdp_qlora.cli.show import print_stopped
from fsdp_qlora.cli.train import _goes_on
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.run import fit
from fsdp_qlora.run.folder import RunFolder
from tests.forged import make_checkpoint


def _identity(lr: float, digest: str, repairs: tuple[str, ...] = ()) -> dict:
    return identity_of(to_dict(from_dict({"optim": {"lr": lr}})), {"model.safetensors": digest}, "rows", repairs)


@pytest.mark.parametrize(("now", "overrides"), [
    (_identity(2.0, "a"), "checkpoint.resume_overrides=[optim.lr]"),
    (_identity(1.0, "b"), None),
    (_identity(1.0, "a", ("buffers of the files are loaded",)), None),
    (_identity(2.0, "b"), None),  # the learning rate alone would not be enough
])  # fmt: skip
def test_overrides_are_suggested_only_where_they_help(now, overrides):
    with pytest.raises(ConfigError) as refused:
        compare(_identity(1.0, "a"), now, Path("step_00000002"))
    said = str(refused.value)
    assert (overrides in said) if overrides else ("resume_overrides" not in said and "base model" in said), said


def _before(monkeypatch, folder: Path, prompts: list[str], resumed: bool) -> list[str | None]:
    monkeypatch.setattr(fit, "on_main", lambda work, _: work())
    config = from_dict({"train": {"sample_prompts": prompts}})
    asked = [SimpleNamespace(text=prompt) for prompt in prompts]
    answers = lambda: [f"to {prompt}" for prompt in prompts]  # noqa: E731
    training = SimpleNamespace(config=config, prompts=asked, ranks=None, answers=answers)
    return list(fit._before(training, SimpleNamespace(path=folder), folder if resumed else None))


def test_a_resumed_run_has_the_answers_of_its_first_start_or_none(monkeypatch, tmp_path, capsys):
    assert _before(monkeypatch, tmp_path, ["a", "b"], False) == ["to a", "to b"]
    assert _before(monkeypatch, tmp_path, ["b", "a"], True) == ["to b", "to a"]
    assert capsys.readouterr().err == ""
    assert _before(monkeypatch, tmp_path, ["c", "b"], True) == [None, "to b"]
    assert "does not answer every sample prompt" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "why"), [(None, "is missing"), ("{", "is damaged"), ('["to a"]', "is damaged")])
def test_a_trained_adapter_never_gives_the_answers_before_training(monkeypatch, tmp_path, capsys, content, why):
    file = tmp_path / "answers_before.json"
    if content is not None:
        file.write_text(content)
    assert _before(monkeypatch, tmp_path, ["a"], True) == [None]
    said = capsys.readouterr().err
    assert f"{file} {why}" in said and "no answers from before training" in said
    assert file.exists() is (content is not None)
    assert _before(monkeypatch, tmp_path, [], True) == [] and capsys.readouterr().err == ""


def test_a_restart_says_where_it_goes_on(tmp_path):
    folder = RunFolder(str(tmp_path), "run")

    def said(resume: str) -> str:
        return _goes_on(from_dict({"checkpoint": {"resume": resume}}), folder)

    assert "starting over" in said("auto") and "starting over" in said("never")
    make_checkpoint(folder.checkpoints / "step_00000002")
    assert said("auto") == "resuming from the last checkpoint"
    assert "resuming from /kept/step_00000001" in said("/kept/step_00000001")


def test_a_stopped_run_names_only_what_it_saved(tmp_path, capsys):
    print_stopped(tmp_path / "step_00000004")
    assert f"saved {tmp_path}/step_00000004; to resume" in capsys.readouterr().out
    print_stopped(None)
    assert "there was nothing to save; to resume" in capsys.readouterr().out


def test_settings_younger_than_a_checkpoint_must_match_only_if_they_are_set():
    assert not {"lora.options", "model.add_tokens"} & blocking_settings(to_dict(from_dict({}))).keys()
    given = from_dict({"lora": {"variant": "oft", "options": {"oft_block_size": 16}}})
    assert blocking_settings(to_dict(given))["lora.options"] == {"oft_block_size": 16}
