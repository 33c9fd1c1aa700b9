"""A run writes its page at its end, however it ends, and its page costs it nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import poisoned

pytestmark = pytest.mark.full


def test_a_run_ends_with_its_page_and_a_page_that_fails_costs_nothing(cli, tiny_run, tmp_path: Path) -> None:
    run = tmp_path / "outputs/tiny"
    first = cli("train", *tiny_run, "launcher.nproc_per_node=1", 'train.sample_prompts=["<script>who?"]')
    assert first.returncode == 0, first.stderr
    assert f"report: {run / 'report.html'}" in first.stdout
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;who?" in page and "<script" not in page
    start, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("start", "summary"))
    assert start["total_steps"] == summary["steps"]
    assert start["plan"]["peak_planned_bytes"] == summary["planned_bytes_per_rank"]
    lengths = start["data"]["lengths"]
    assert sum(lengths["histogram"]["counts"]) == start["data"]["training_rows"]["kept"] > 0
    assert lengths["shortest"] <= lengths["median"] <= lengths["longest"] <= 64
    assert start["auto"].keys() == summary["auto"].keys()
    for words in ("finished", "model.attn_implementation", str(lengths["longest"]), "optim.lr", "transformers"):
        assert words in page, words

    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # cannot be replaced by a file
    (run / "report.html" / "mine").touch()
    again = cli("train", *tiny_run, "launcher.nproc_per_node=1", "train.max_steps=5")
    assert again.returncode == 0, again.stderr
    warnings = [line for line in again.stderr.splitlines() if "report.html was not written" in line]
    assert len(warnings) == 1 and "fsdp-qlora report" in warnings[0]
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    told = [json.loads(line) for line in (run / "messages.jsonl").read_text().splitlines()]
    assert any("report.html" in each["message"] for each in told)


def test_a_run_that_fails_has_a_page_too(cli, tiny_model: Path, chat_rows: Path, tiny_run, tmp_path: Path) -> None:
    model, file, _ = poisoned(tiny_model, chat_rows, tmp_path)
    given = [f"model.name={model}", f"data.train={file}", "run.name=bad", "data.eval_fraction=0", "precision=fp32"]
    kept = [each for each in tiny_run if each.partition("=")[0] not in {g.partition("=")[0] for g in given}]
    for ranks in (2, 1):
        ran = cli("train", *kept, *given, "train.num_epochs=1", "train.max_steps=0", f"launcher.nproc_per_node={ranks}",
                  "checkpoint.resume=never", f"run.output_root={ranks}")  # fmt: skip
        assert ran.returncode == 1, ran.stderr
        page = (tmp_path / str(ranks) / "bad/report.html").read_text()
        assert "failed with exit code 1" in page and "not finite" in page
        assert "report" not in ran.stderr.strip().splitlines()[-1], "what the ranks said comes last"
