"""MiniLM on real texts: metrics on held-out rows above a baseline by more than their interval.

Needs its weights: python -m tools.minilm.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.studies.compare import difference
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.objectives.contrast import retrieval
from fsdp_qlora.objectives.embedding import unpacked
from fsdp_qlora.run.evaluate import evaluate_prepared
from fsdp_qlora.run.fit import fit
from tests.build import build
from tools.minilm import MINILM

EMBEDDED = cache_folder() / "embedded"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not MINILM.is_dir(), reason="no weights: python -m tools.minilm"),
    pytest.mark.skipif(not EMBEDDED.is_dir(), reason="no embedded data: make data"),
]


def _before_and_after(ranks, root, groups):
    """Train; return what held-out rows were predicted to be before and after, and the summary."""
    groups = {"data": {}, "train": {}, **groups}
    groups["train"] = {"global_batch_size": 16, "micro_batch_size": 8, "max_steps": 60, **groups["train"]}
    groups["data"] = {"max_length": 64, **groups["data"]}
    shared = {"lora": {"r": 16, "alpha": 32}, "run": {"output_root": root, "name": "run"}}
    prepared = build(ranks, str(MINILM), **{**shared, "optim": {"lr": 1e-3}, **groups})
    before = evaluate_prepared(prepared).observed
    summary = fit(prepared).summary
    return before, evaluate_prepared(prepared).observed, summary


def _labelled(text):
    """Return words in small letters, and whether each had a capital and what came after it."""
    words, labels = [], []
    for word in text.split():
        bare = re.sub(r"\W+$", "", word)
        if re.fullmatch(r"[A-Za-z][a-z]*", bare):
            after = {",": " comma", ".": " stop"}.get(word[len(bare) :][:1], "")
            words.append(bare.lower())
            labels.append(("capital" if bare[0].isupper() else "small") + after)
    return {"tokens": words, "labels": labels}


def test_capitals_and_punctuation_of_an_encyclopedia(pool, tmp_path):
    lines = (EMBEDDED / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    pieces = [_labelled(line[at : at + 240]) for line in lines for at in range(0, min(len(line), 10_000), 240)]
    pieces = [piece for piece in pieces if piece["tokens"]]  # some end in numbers or another script
    random.Random(0).shuffle(pieces)
    for name, rows in {"train": pieces[200:], "eval": pieces[:200]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    groups = {"objective": {"name": "token_classification"}, "data": data}
    _, after, summary = pool.run(2, _before_and_after, str(tmp_path), groups)[0]
    ((most, _),) = Counter(label for _, wanted in after for label in wanted).most_common(1)
    rows = [(np.mean(np.equal(ours, wanted)), np.mean(np.equal(wanted, most))) for ours, wanted in after]
    _, low, high = difference(*([[(share, 1) for share in side]] for side in zip(*rows, strict=True)))
    print("share of right words above the most common label's:", low, high, summary["metrics_after"])
    assert low > 0
    assert summary["metrics_after"]["f1"] > summary["metrics_before"]["f1"]


def test_the_answer_that_a_question_is_about(pool, tmp_path):
    rows = [json.loads(line) for line in (EMBEDDED / "alpaca_en_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if not row["input"] and len(row["output"]) >= 40]
    random.Random(0).shuffle(rows)
    pairs = [{"anchor": row["instruction"], "positive": row["output"][:40]} for row in rows]
    for name, some in {"train": pairs[300:], "eval": pairs[:300]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "max_length": 32}
    train = {"global_batch_size": 64, "micro_batch_size": 16, "max_steps": 40}
    groups = {"objective": {"name": "embedding"}, "data": data, "train": train, "optim": {"lr": 3e-4}}
    before, after, summary = pool.run(2, _before_and_after, str(tmp_path), groups)[0]
    first, _ = zip(*(_retrieved(rows) for rows in (before, after)), strict=True)
    _, low, high = difference(*([[(right, 1) for right in side]] for side in (first[1], first[0])))
    print("answers found, above the untrained model:", low, high, summary["metrics_before"], summary["metrics_after"])
    assert low > 0


def _retrieved(observed):
    anchors, positives = (torch.from_numpy(np.stack([unpacked(row[side]) for row in observed])) for side in (0, 1))
    return retrieval(anchors, positives)


def test_masked_words_of_an_encyclopedia(pool, tmp_path):
    lines = (EMBEDDED / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.txt").write_text("".join(line[:6000] + "\n" for line in lines[3:]))
    (tmp_path / "eval.txt").write_text("".join(line[:3000] + "\n" for line in lines[:3]))
    data = {"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.txt"), "truncation": "split"}
    groups = {"objective": {"name": "masked_lm"}, "data": data, "train": {"max_steps": 40}}
    _, _, summary = pool.run(2, _before_and_after, str(tmp_path), groups)[0]
    print("masked loss:", summary["eval_loss_before"], summary["eval_loss_after"])
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1
