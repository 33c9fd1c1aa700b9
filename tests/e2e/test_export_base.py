"""`export what=base-4bit`: a base that the trainer and transformers load without quantizing."""

from __future__ import annotations

import pytest

from tests.build import losses, run_fit

pytestmark = pytest.mark.launch


@pytest.mark.full
def test_training_from_an_exported_base_gives_the_same_losses(cli, pool, tiny_model, chat_rows, tmp_path):
    settings = ("what=base-4bit", f"model.name={tiny_model}", "export.to=base", "quant.double_quant=false")
    exported = cli("export", *settings, "launcher.device=cpu")
    assert exported.returncode == 0, exported.stderr
    assert "14 linears in nf4" in exported.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    again = cli("export", *settings, "launcher.device=cpu")
    assert again.returncode == 2 and "export.to:" in again.stderr and "Traceback" not in again.stderr

    found = []
    for name, folder in (("plain", tiny_model), ("stored", tmp_path / "base")):
        groups = {"data": {"train": str(chat_rows), "max_length": 64}, "quant": {"double_quant": False}}
        found.append(losses(pool.run(2, run_fit, str(folder), str(tmp_path), name, groups)[0]["metrics"]))
    assert len(found[0]) == 4 and found[0] == found[1]
