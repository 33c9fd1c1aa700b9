"""`export what=base-4bit`: a base that transformers and the trainer load without quantizing."""

from __future__ import annotations

import pytest

from tests.build import losses, metrics

pytestmark = pytest.mark.launch


def test_training_from_an_exported_base_gives_the_same_losses(cli, tiny_run, tmp_path):
    exported = cli("export", "what=base-4bit", tiny_run[0], "export.to=base", "quant.double_quant=false")
    assert exported.returncode == 0, exported.stderr
    assert "14 linears in nf4" in exported.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]

    found = []
    for name, model in (("plain", tiny_run[0]), ("stored", "model.name=base")):
        done = cli("train", *tiny_run[1:], model, "quant.double_quant=false", f"run.name={name}")
        assert done.returncode == 0, done.stderr
        assert ("14 of them read as stored" in done.stdout) == (name == "stored")
        found.append(losses(metrics(tmp_path / "outputs" / name)))
    assert len(found[0]) == 4 and found[0] == found[1]
