"""Topics of Debian's fortunes on MiniLM and SmolLM2-135M: a run beats a linear probe of the same features and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.studies.compare import difference
from fsdp_qlora.files.home import cache_folder
from tools.fortunes import FORTUNES, write_topics
from tools.minilm import MINILM

pytestmark = [pytest.mark.launch, pytest.mark.full]
SMOLLM = cache_folder() / "embedded" / "smollm2-135m-instruct"
LENGTH, TRAIN, HELD = 96, 2400, 600
"""Tokens of a text, and rows."""


@torch.no_grad()
def _states(model: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return what plain transformers makes of the texts: the mean and the last of the final hidden states."""
    from transformers import AutoModel, AutoTokenizer

    base: Any = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    means, lasts = [], []
    for text in texts:
        hidden = base(**tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")).last_hidden_state[0]
        means.append(hidden.mean(0))
        lasts.append(hidden[-1])
    return torch.stack(means).numpy(), torch.stack(lasts).numpy()


def _probed(model: Path, train: list[dict[str, str]], held: list[dict[str, str]]) -> np.ndarray:
    """Return which held-out rows the better of two linear probes gets right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, new = (_states(model, [row["text"] for row in rows]) for rows in (train, held))
    wanted = np.array([row["label"] for row in held])
    right = []
    for seen, unseen in zip(known, new, strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=3000))
        right.append(probe.fit(seen, [row["label"] for row in train]).predict(unseen) == wanted)
    return max(right, key=lambda one: one.mean())


def _predicted(base: Path, adapter: Path, held: list[dict[str, str]]) -> np.ndarray:
    """Return which rows plain transformers and PEFT get right, on weights that are not quantized."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config: Any = AutoConfig.from_pretrained(adapter)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(plain, adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    right = []
    for row in held:
        ids = tokenizer(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            right.append(config.id2label[int(model(**ids).logits.argmax())] == row["label"])
    return np.array(right)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("model", "lr", "epochs"), [(MINILM, "1e-3", 3), (SMOLLM, "1e-3", 1)], ids=["MiniLM", "SmolLM2"]
)
def test_topics_are_told_apart_better_than_by_a_linear_probe(cli, tmp_path, model, lr, epochs):
    pytest.importorskip("sklearn", reason="the extra tasks")
    for folder, how in ((FORTUNES, "tools.fortunes"), (model, "tools.minilm")):
        if not folder.is_dir():
            pytest.skip(f"no {folder.name}; `make data` or `python -m {how}` fetches it")
    files = write_topics(tmp_path / "topics", TRAIN, HELD)
    result = cli(
        "train", "objective=sequence_classification", f"model.name={model}", f"data.train={files[0]}",
        f"data.eval={files[1]}", f"data.max_length={LENGTH}", f"train.num_epochs={epochs}",
        "train.global_batch_size=16", "train.micro_batch_size=8", "train.eval_batch_size=32", "train.eval_every=0",
        f"optim.lr={lr}", "run.name=topics", "launcher.device=cpu", "launcher.nproc_per_node=2", timeout=6000,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "outputs/topics/summary.json").read_text())
    train, held = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    ours, probe = _predicted(model, tmp_path / "outputs/topics/adapter", held), _probed(model, train, held)
    labels = [row["label"] for row in train]
    majority = max(set(labels), key=labels.count)
    common = np.mean([row["label"] == majority for row in held])
    _, low, high = difference(*([[(right, 1) for right in side]] for side in (ours, probe)))
    print(
        f"topics: {ours.mean():.3f} right by plain PEFT, by the run {summary['metrics_after']['accuracy']:.3f}; linear "
        f"probe {probe.mean():.3f}, above it by {low:.3f} to {high:.3f} (95 %); most common topic {common:.3f}"
    )
    assert abs(ours.mean() - summary["metrics_after"]["accuracy"]) < 0.02
    assert low > 0 and probe.mean() > common
