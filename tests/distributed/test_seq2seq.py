"""objective=seq2seq: what encoder-decoders write is what upstream's own `generate` writes, and pairs are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.build import refused_fit, run_fit
from tests.families import write_family
from tests.objectives import CASES, exported_loss, source_and_target, upstream_texts, written_texts
from tests.tiny import make_model
from tests.tolerances import FP32_LOSSES

pytestmark = pytest.mark.full
LENGTH = 12


def loud_family(folder: Path, family: str) -> Path:
    """Write a tiny model whose tokens differ enough that it can say them without a trained head."""
    write_family(folder, family)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(12)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.zero_()
    model.save_pretrained(folder)
    return folder


def _settings(folder: Path, rows: int = 16, **objective: Any) -> dict[str, Any]:
    """Return settings of a run on some rows, which are held out, too."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(source_and_target(number)) + "\n" for number in range(rows)))
    return {
        "data": {"train": str(file), "eval": str(file), "eval_fraction": 0.0},
        "objective": {"name": "seq2seq", "max_target_length": LENGTH, **objective},
        "precision": {"name": "fp32"},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_what_is_written_is_what_upstream_writes(pool, tmp_path, family):
    pytest.importorskip("sacrebleu", reason="the extra tasks")
    folder = loud_family(tmp_path / "model", family)
    file = folder / "generation_config.json"
    asked = {"suppress_tokens": [0, 1, 2], "forced_eos_token_id": None, "num_beams": 3}  # upstream refuses both
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    groups = _settings(tmp_path, generate_rows=100)
    wanted, loss = pool.run(1, upstream_texts, str(folder), groups)[0]
    assert len(set(wanted)) > 1
    for num_ranks in (1, 4):  # all of the pool: transformers asks the whole world whether it is done
        pairs, metrics, ours = pool.run(num_ranks, written_texts, str(folder), groups)[0]
        assert [written for written, _ in pairs] == wanted
        assert [right for _, right in pairs] == [source_and_target(number)["target"] for number in range(16)]
        assert ours == pytest.approx(loss, rel=FP32_LOSSES)
        assert metrics.keys() == {"perplexity", "rouge1", "rouge2", "rougeL", "bleu"}


@pytest.mark.parametrize(("family", "lr", "steps"), [("t5", 0.01, 60), ("bart", 0.003, 100), ("marian", 0.003, 150)])
def test_sixteen_pairs_are_learned_by_heart(pool, tmp_path, family, lr, steps):
    pytest.importorskip("sacrebleu", reason="the extra tasks")
    folder = loud_family(tmp_path / "model", family)
    groups = _settings(tmp_path) | {
        "optim": {"lr": lr}, "lora": {"r": 16, "alpha": 32},
        "train": {"max_steps": steps, "global_batch_size": 16, "micro_batch_size": 16, "eval_batch_size": 16},
    }  # fmt: skip
    summary = pool.run(1, run_fit, str(folder), str(tmp_path), "learned", groups)[0]["summary"]
    assert summary["metrics_before"]["rougeL"] < 0.5 and summary["metrics_after"]["rougeL"] > 0.95
    assert summary["metrics_after"]["bleu"] > 90


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if case.objective["name"] == "seq2seq"])
def test_plain_peft_gives_the_loss_of_the_last_evaluation(pool, tmp_path, kind):
    model, groups = CASES[kind].write(tmp_path)
    summary = pool.run(2, run_fit, model, str(tmp_path), "run", groups)[0]["summary"]
    loss = pool.run(1, exported_loss, model, groups, str(tmp_path / "run/adapter"))[0]
    assert loss == pytest.approx(summary["eval_loss_after"], rel=FP32_LOSSES)


def test_what_it_cannot_train_is_refused_in_one_message(pool, tmp_path):
    groups = _settings(tmp_path)
    said = pool.run(2, refused_fit, str(make_model(tmp_path / "llama")), str(tmp_path), groups)
    assert said[0] == said[1] and said[0].startswith("2 model.name: a llama is not an encoder-decoder")
    folder = write_family(tmp_path / "t5", "t5")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(source_and_target(1)) + "\n" + json.dumps({"source": "fox", "target": " "}) + "\n")
    groups["data"] = replace_sources(groups["data"], bad)
    said = pool.run(2, refused_fit, str(folder), str(tmp_path), groups)
    assert said[0] == said[1] and "bad.jsonl, line 2: the target is empty" in said[0] and said[0].startswith("2 ")


def replace_sources(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return settings of data with other training rows."""
    return {**data, "train": str(file), "eval": None}
