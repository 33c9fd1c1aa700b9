"""objective=seq2seq with Whisper: what it writes is what upstream's own `generate` writes; recordings are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from scipy.io import wavfile
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from tests.build import build, refused_fit, run_fit
from tests.families import write_family
from tests.objectives import CASES, upstream_texts, written_texts
from tests.speech import RATE, said, tones, write_recordings, write_whisper
from tests.tolerances import FP32_LOSSES

pytestmark = pytest.mark.full
LENGTH = 12


def _settings(folder: Path, rows: int = 16, **objective: Any) -> dict[str, Any]:
    """Return settings of a run on some recordings, which are held out, too."""
    file = str(write_recordings(folder / "heard", rows))
    return {
        "data": {"train": file, "eval": file, "eval_fraction": 0.0},
        "objective": {"name": "seq2seq", "max_target_length": LENGTH, **objective},
        "precision": {"name": "fp32"},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }


@pytest.mark.parametrize("several", [False, True], ids=["English", "several languages"])
def test_what_is_written_is_what_upstream_writes(pool, tmp_path, several):
    jiwer = pytest.importorskip("jiwer", reason="the extra tasks")
    folder = write_whisper(tmp_path / "model", several, std=0.24)
    asked = {"language": "fr", "task": "translate"} if several else {}
    groups = _settings(tmp_path, generate_rows=100, **asked)
    wanted, loss = pool.run(1, _upstream, str(folder), groups, asked)[0]
    assert len(set(wanted)) > 1
    for num_ranks in (1, 4):  # all of the pool: transformers asks the whole world whether it is done
        pairs, metrics, ours = pool.run(num_ranks, written_texts, str(folder), groups)[0]
        assert [written for written, _ in pairs] == wanted
        assert [right for _, right in pairs] == [said(number) for number in range(16)]
        assert ours == pytest.approx(loss, rel=FP32_LOSSES)
        assert metrics.keys() == {"perplexity", "wer", "wer_words", "cer"}
        assert metrics["wer"] == pytest.approx(jiwer.wer([right for _, right in pairs], wanted))


def _upstream(ranks: Any, folder: str, groups: dict[str, Any], asked: dict[str, str]) -> tuple[list[str], float]:
    return upstream_texts(ranks, folder, groups, **asked)


def test_sixteen_recordings_are_learned_by_heart_and_the_export_stands_alone(pool, tmp_path):
    pytest.importorskip("jiwer", reason="the extra tasks")
    folder = write_whisper(tmp_path / "model", several=True)
    groups = _settings(tmp_path, language="english") | {
        "optim": {"lr": 0.003}, "lora": {"r": 16, "alpha": 32},
        "train": {"max_steps": 120, "global_batch_size": 16, "micro_batch_size": 16, "eval_batch_size": 16},
    }  # fmt: skip
    summary = pool.run(1, run_fit, str(folder), str(tmp_path), "learned", groups)[0]["summary"]
    assert summary["metrics_before"]["wer"] > 0.9 and summary["metrics_after"]["wer"] < 0.05
    adapter = tmp_path / "learned/adapter"
    processor = WhisperProcessor.from_pretrained(adapter)
    base = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, adapter).eval()
    for number in range(4):
        rate, samples = wavfile.read(tmp_path / f"heard/recordings/{number}.wav")
        heard = processor(samples / 32768, sampling_rate=rate, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**heard, language="en", task="transcribe", max_new_tokens=LENGTH)
        assert processor.batch_decode(ids, skip_special_tokens=True) == [said(number)]


def test_bf16_on_one_rank_and_two(pool, tmp_path):
    model, groups = CASES["whisper"].write(tmp_path)
    groups["precision"] = {"name": "bf16"}
    lines = [pool.run(n, run_fit, model, str(tmp_path), f"r{n}", dict(groups))[0]["metrics"] for n in (1, 2)]
    one, two = ([line["loss"] for line in each if "loss" in line] for each in lines)
    assert two == pytest.approx(one, rel=0.02) and two[-1] < two[0]


def _write_rows(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _said_of(pool: Any, folder: Path, root: Path, groups: dict[str, Any]) -> str:
    said = pool.run(2, refused_fit, str(folder), str(root), groups)
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0]


def test_bad_rows_are_refused_by_file_and_row(pool, tmp_path):
    folder = write_whisper(tmp_path / "model")
    groups = _settings(tmp_path, generate_rows=0)
    heard = tmp_path / "heard"
    whole = (heard / "recordings/1.wav").read_bytes()
    (heard / "notes.wav").write_bytes(b"no sound at all")
    (heard / "cut.wav").write_bytes(whole[: len(whole) // 2])
    wavfile.write(heard / "slow.wav", 1000, tones(said(1), 1000))
    (heard / "music.mp3").write_bytes(b"ID3\x04" + bytes(100))
    good = {"audio": "recordings/1.wav", "text": said(1)}
    cases = {
        "missing": ({**good, "audio": "recordings/99.wav"}, "there is no recording"),
        "junk": ({**good, "audio": "notes.wav"}, "notes.wav is no WAV file"),
        "mp3": ({**good, "audio": "music.mp3"}, "music_16k.wav"),
        "cut": ({**good, "audio": "cut.wav"}, "ends before its header says"),
        "rate": ({**good, "audio": "slow.wav"}, "1000 samples a second; from 4000 to 192000"),
        "empty": ({**good, "text": " "}, "the text is empty"),
        "no text": ({"audio": "recordings/1.wav"}, "no 'text'"),
        "no audio": ({"text": "fox"}, "no 'audio'"),
    }
    for name, (row, words) in cases.items():
        rows = _write_rows(heard / f"{name}.jsonl", good, good, row)
        refusal = _said_of(pool, folder, tmp_path, {**groups, "data": {"train": rows}})
        assert refusal.startswith("2 ") and f"{name}.jsonl, line 3" in refusal and words in refusal, refusal
    refusal = _said_of(pool, folder, tmp_path, {**groups, "objective": {"name": "seq2seq", "max_target_length": 100},
                       "data": {"train": _write_rows(heard / "long.jsonl", {**good, "text": "fox " * 60})}})  # fmt: skip
    assert "long.jsonl, line 1" in refusal and "positions for 48" in refusal


def _counted(ranks: Any, folder: str, groups: dict[str, Any]) -> tuple[int, int, int, int]:
    prepared = build(ranks, folder, **groups)
    assert prepared.data is not None
    counts = prepared.data.train_counts
    prepared.close()
    return counts.rows, counts.kept, counts.dropped_long, prepared.plan.settings.max_length


def test_recordings_longer_than_it_hears_are_dropped_and_counted(pool, tmp_path):
    folder = write_whisper(tmp_path / "model")
    groups = _settings(tmp_path, generate_rows=0)
    wavfile.write(tmp_path / "heard/long.wav", RATE, tones("fox " * 11))
    good = [{"audio": f"recordings/{n}.wav", "text": said(n)} for n in range(6)]
    rows = _write_rows(tmp_path / "heard/some.jsonl", *good, {"audio": "long.wav", "text": "fox " * 11})
    asked = {**groups, "data": {"train": rows}}
    assert pool.run(1, _counted, str(folder), asked)[0] == (7, 6, 1, 50)  # positions of its encoder are planned


def test_what_it_cannot_train_is_refused_in_one_message(pool, tmp_path):
    several, english = write_whisper(tmp_path / "several", True), write_whisper(tmp_path / "english")
    groups = _settings(tmp_path, generate_rows=0)
    asked = groups["objective"]
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (several, {}, "objective.language: this Whisper knows several languages"),
        (several, {"objective": {**asked, "language": "klingon"}}, "objective.language: Unsupported language: klingon"),
        (english, {"objective": {**asked, "language": "en"}}, "objective.language: this Whisper knows only English"),
        (english, {"objective": {**asked, "task": "translate"}}, "objective.task: this Whisper knows only English"),
        (
            english,
            {"objective": {**asked, "source_prefix": "x: "}},
            "objective.source_prefix: a whisper reads recordings",
        ),
        (english, {"model": {"config_overrides": {"apply_spec_augment": True}}}, "apply_spec_augment"),
        (write_family(tmp_path / "t5", "t5"), {"objective": {**asked, "language": "en"}}, "a t5 reads texts"),
    ]
    for folder, more, words in cases:
        refusal = _said_of(pool, folder, tmp_path, {**groups, **more})
        assert refusal.startswith("2 ") and words in refusal, refusal
    (english / "preprocessor_config.json").unlink()
    assert "no usable feature extractor" in _said_of(pool, english, tmp_path, groups)
