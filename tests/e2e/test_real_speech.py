"""Whisper (tiny.en) on sentences that espeak-ng reads: after a run it mishears fewer words than before, held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.studies.compare import difference
from fsdp_qlora.data.audio import read_recording
from tools.whisper import WHISPER, write_speech

pytestmark = [pytest.mark.launch, pytest.mark.full]
TRAIN, HELD = 320, 100
"""Rows."""


def _misheard(folder: Path, rows: list[dict[str, Any]], adapter: Path | None = None) -> np.ndarray:
    """Return the words that plain transformers (and PEFT) gets wrong in each row, on weights that are not quantized."""
    import jiwer
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model: Any = WhisperForConditionalGeneration.from_pretrained(WHISPER, dtype=torch.float32).eval()
    processor: Any = WhisperProcessor.from_pretrained(WHISPER if adapter is None else adapter)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    wrong = []
    for row in rows:
        samples = read_recording(folder / row["audio"], 16_000)
        with torch.no_grad():
            ids = model.generate(**processor(samples, sampling_rate=16_000, return_tensors="pt"), max_new_tokens=40)
        (text,) = processor.batch_decode(ids, skip_special_tokens=True)
        counted = jiwer.process_words(row["text"], text.strip())
        wrong.append(counted.substitutions + counted.deletions + counted.insertions)
    return np.array(wrong)


@pytest.mark.timeout(7200)
def test_fewer_words_are_misheard(cli, tmp_path):
    pytest.importorskip("jiwer", reason="the extra tasks")
    if not (WHISPER / "config.json").is_file():
        pytest.skip("not here; `python -m tools.whisper` fetches it")
    if shutil.which("espeak-ng") is None:
        pytest.skip("no espeak-ng, which reads the sentences")
    train, held = write_speech(tmp_path / "speech", TRAIN, HELD)
    result = cli(
        "train", "objective=seq2seq", f"model.name={WHISPER}", f"data.train={train}", f"data.eval={held}",
        f"objective.generate_rows={HELD}", "objective.max_target_length=40", "train.num_epochs=1",
        "train.global_batch_size=16", "train.micro_batch_size=4", "train.eval_batch_size=4", "train.eval_every=0",
        "optim.lr=1e-3", "run.name=speech", "launcher.device=cpu", "launcher.nproc_per_node=2", timeout=6000,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "outputs/speech/summary.json").read_text())
    rows = [json.loads(line) for line in held.read_text().splitlines()]
    words = np.array([len(row["text"].split()) for row in rows])
    before = _misheard(tmp_path / "speech", rows)
    after = _misheard(tmp_path / "speech", rows, tmp_path / "outputs/speech/adapter")
    _, low, high = difference(*([list(zip(wrong, words, strict=True))] for wrong in (before, after)))
    print(
        f"WER by plain transformers: {before.sum() / words.sum():.3f} -> {after.sum() / words.sum():.3f}, fewer by "
        f"{low:.3f} to {high:.3f} (95 %); by the run: {summary['metrics_before']} -> {summary['metrics_after']}"
    )
    assert low > 0 and summary["metrics_after"]["wer"] < summary["metrics_before"]["wer"]
