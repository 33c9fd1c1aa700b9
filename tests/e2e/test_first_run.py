"""A first run on one's own rows, by README's command: what it learns, and what it says at its end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import own_rows

pytestmark = [pytest.mark.launch, pytest.mark.full]
QUESTIONS = 10


def _answers(cli, run: Path, folder: Path, questions: list[str]) -> list[str]:
    """Return the trained model's answers to prompts."""
    asked = folder / "questions.jsonl"
    asked.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    said = cli(
        "generate", f"run_from={run / 'config.yaml'}", f"adapter={run / 'adapter'}", f"generate.prompts={asked}",
        f"generate.to={folder / 'answers.jsonl'}", "generate.max_new_tokens=32", timeout=600,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return [json.loads(line)["answer"] for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_96_rows_are_learned_in_another_wording(cli, real_model, tmp_path):
    file = own_rows.write(tmp_path / "rows.jsonl", own_rows.rows())
    done = cli("train", f"model.name={real_model}", f"data.train={file}", "run.name=mine", timeout=3600)
    assert done.returncode == 0, done.stderr
    for line in (
        "auto: train.global_batch_size=8 (an epoch of 91 rows has 12 steps)", "auto: train.num_epochs=15 (171 steps",
        "auto: optim.lr=0.0013 (hidden size 576 of a llama)", "auto: data.eval_fraction=0.052 (5 of 96 rows",
    ):  # fmt: skip
        assert line in done.stdout
    run = tmp_path / "outputs/mine"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 171 and summary["verdict"]["word"] == "learned"
    known = own_rows.codes()
    names = sorted(known)[:QUESTIONS]
    answers = _answers(cli, run, tmp_path, [own_rows.UNSEEN.format(name) for name in names])
    right = sum(known[name] in answer for name, answer in zip(names, answers, strict=True))
    assert right >= 9, answers


ENDINGS = {
    "20 rows": (own_rows.rows(7)[:20], "learned"),
    "1,000 rows": (own_rows.rows(334)[:1000], "learned"),
    "rows that contradict each other": (own_rows.rows(8, contradict=True), "overfits"),
}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", ENDINGS)
def test_rows_end_in_their_word(case, cli, real_model, tmp_path):
    """By README's command: rows that can be learned, and rows of which only the form can."""
    rows, word = ENDINGS[case]
    file = own_rows.write(tmp_path / "rows.jsonl", rows)
    done = cli("train", f"model.name={real_model}", f"data.train={file}", "run.name=mine", timeout=7000)
    assert done.returncode == 0, done.stderr
    verdict = json.loads((tmp_path / "outputs/mine/summary.json").read_text())["verdict"]
    assert verdict["held_out"] and verdict["word"] == word, verdict
    assert f"\n{word}: held-out loss " in done.stdout


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lr", ["1e-7", "1"])
def test_a_learning_rate_far_off_learns_nothing(lr, cli, real_model, tmp_path):
    file = own_rows.write(tmp_path / "rows.jsonl", own_rows.rows())
    done = cli(
        "train", f"model.name={real_model}", f"data.train={file}", "data.max_length=64", "train.max_steps=12",
        f"optim.lr={lr}", "run.name=mine", "launcher.device=cpu", "train.sample_tokens=4",
        "train.eval_every=0", timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verdict = json.loads((tmp_path / "outputs/mine/summary.json").read_text())["verdict"]
    assert verdict["word"] == "nothing learned" and verdict["reasons"][0].startswith("the learning rate, "), verdict
    assert f"is too {'low' if lr == '1e-7' else 'high'}; optim.lr=auto takes 0.0013" in verdict["reasons"][0]
    end = done.stdout[done.stdout.index("mine: done") :]
    assert "nothing learned: " in end
    assert max(len(line) for line in end.splitlines() if not re.search("fsdp-qlora|/", line)) <= 80
    (again,) = re.findall(r"train again: (.*)", end)
    assert shlex.split(again)[1:] == [
        "train", f"run_from={tmp_path / 'outputs/mine/config.yaml'}", "run.name=mine-2", "optim.lr=auto",
    ]  # fmt: skip
    (question,) = re.findall(r"try next: .*'prompt=(.*)'", end)
    assert question in [row["messages"][0]["content"] for row in own_rows.rows()]  # type: ignore[index]
