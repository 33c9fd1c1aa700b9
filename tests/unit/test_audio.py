"""Recordings: what is read of WAV files, and what is stored of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor

from fsdp_qlora.config.schema import DataSettings, ObjectiveSettings
from fsdp_qlora.data.audio import Recording, check_recordings, read_recording
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.spoken import SpokenEncoder
from fsdp_qlora.errors import DataError, ModelError
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.objectives.scores import of_speech
from tests.speech import RATE, make_whisper_tokenizer, said, tones, write_recordings

WAVE = tones("quick brown fox")
DEPTHS = {"uint8": 2**-7, "int16": 2**-15, "int32": 2**-24, "float32": 2**-24, "float64": 2**-24}
"""dtype of a WAV file's samples, and how far from the wave they may be."""


def _written(dtype: str, wave: np.ndarray) -> np.ndarray:
    """Return samples between -1 and 1 as a WAV file of this dtype holds them."""
    if dtype.startswith("float"):
        return wave.astype(dtype)
    whole = 2 ** (8 * np.dtype(dtype).itemsize - 1)
    return (np.round(wave * whole) + (whole if dtype == "uint8" else 0)).astype(dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DEPTHS)
def test_samples_of_any_depth_are_between_minus_one_and_one(tmp_path, dtype):
    wavfile.write(tmp_path / "one.wav", RATE, _written(dtype, WAVE))
    heard = read_recording(tmp_path / "one.wav", RATE)
    assert heard.dtype == np.float32 and np.abs(heard - WAVE).max() <= DEPTHS[dtype]


@pytest.mark.full
def test_channels_are_averaged_and_another_rate_is_converted(tmp_path):
    both = np.stack([WAVE, -0.5 * WAVE], axis=1)
    wavfile.write(tmp_path / "both.wav", 22_050, both)
    heard = read_recording(tmp_path / "both.wav", RATE)
    assert len(heard) == -(-len(WAVE) * 320 // 441)
    assert np.array_equal(heard, resample_poly(both.mean(axis=1), 320, 441).astype(np.float32))


def test_what_is_no_whole_recording_is_named_with_what_to_do(tmp_path):
    wavfile.write(tmp_path / "one.wav", RATE, _written("int16", WAVE))
    whole = (tmp_path / "one.wav").read_bytes()
    wavfile.write(tmp_path / "nan.wav", RATE, np.array([0.0, np.nan], dtype=np.float32))
    wavfile.write(tmp_path / "none.wav", RATE, np.array([], dtype=np.int16))
    cases = {
        "one.wav": whole, "text.wav": b"hello", "song.flac": b"fLaC" + bytes(60), "cut.wav": whole[:900],
        "zero channels.wav": whole[:22] + bytes(2) + whole[24:], "head.wav": whole[:30], "nan.wav": None,
        "none.wav": None, "gone.wav": b"",
    }  # fmt: skip
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.wav").unlink()
    said_of = dict(zip(cases, map(str, check_recordings([tmp_path / name for name in cases])), strict=True))
    words = {
        "text.wav": "is no WAV file", "song.flac": "song_16k.wav", "cut.wav": "ends before its header says",
        "zero channels.wav": "cannot be read", "head.wav": "cannot be read", "nan.wav": "not finite",
        "none.wav": "no samples", "gone.wav": "there is no recording",
    }  # fmt: skip
    assert {name: words[name] in said_of[name] for name in words} == dict.fromkeys(words, True), said_of
    (one,) = check_recordings([tmp_path / "one.wav"])
    assert isinstance(one, Recording) and one.seconds == len(WAVE) / RATE


def _encoder(file: Path, language: str | None = None, **objective: Any) -> SpokenEncoder:
    tokenizer = make_whisper_tokenizer()
    tokenizer.set_prefix_tokens(language=language, task=language and "transcribe")
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=40, chunk_length=1), tokenizer)
    settings = ObjectiveSettings(name="seq2seq", source="audio", **objective)
    known: Any = tokenizer.get_vocab()
    config = WhisperConfig(decoder_start_token_id=known["<|startoftranscript|>"], eos_token_id=known["<|endoftext|>"],
                           max_source_positions=50, max_target_positions=48)  # fmt: skip
    encoder = build_objective(settings).encoder(DataSettings(train=str(file)), processor, config)
    assert isinstance(encoder, SpokenEncoder)
    return encoder


def _stored(encoder: SpokenEncoder, folder: Path, **values: Any) -> Any:
    ((_, _, outcome),) = encoder.encode([(0, Row("rows.jsonl:1", values, folder=str(folder)))])
    return outcome


def test_labels_are_those_of_upstreams_recipe(tmp_path):
    file = write_recordings(tmp_path, 2)
    for language in (None, "fr"):
        stored = _stored(_encoder(file, language), tmp_path, audio="recordings/1.wav", text=said(1))
        tokenizer = make_whisper_tokenizer()
        tokenizer.set_prefix_tokens(language=language, task=language and "transcribe")
        recipe = tokenizer(said(1))["input_ids"][1:]  # its collator cuts off the token that the decoder starts with
        (item,) = stored.items
        assert list(item["labels"]) == recipe and tokenizer.decode(recipe[-1:]) == "<|endoftext|>"
        assert item["length"] == 50 + len(recipe) and item["targets"] == len(recipe) and item["target"] == said(1)


@pytest.mark.full
def test_long_texts_are_cut_with_their_marks_and_long_recordings_dropped(tmp_path):
    file = write_recordings(tmp_path, 2)
    short = _stored(_encoder(file, max_target_length=4), tmp_path, audio="recordings/1.wav", text="quick fox " * 9)
    (item,) = short.items
    tokenizer = make_whisper_tokenizer()
    assert short.counts.truncated == 1 and len(item["labels"]) == 4
    assert tokenizer.convert_ids_to_tokens(list(map(int, item["labels"][[0, -1]]))) == [
        "<|notimestamps|>",
        "<|endoftext|>",
    ]
    wavfile.write(tmp_path / "long.wav", RATE, np.tile(WAVE, 4))
    long = _stored(_encoder(file), tmp_path, audio="long.wav", text="fox")
    assert long.items == [] and long.counts.dropped_long == 1
    error = _stored(_encoder(file, max_target_length=90), tmp_path, audio="recordings/1.wav", text="zx" * 60)
    assert isinstance(error, DataError) and "positions for 48" in str(error)


@pytest.mark.full
def test_the_identity_of_the_rows_follows_their_recordings(tmp_path):
    file = write_recordings(tmp_path, 2)
    encoder = _encoder(file)
    before = encoder.fingerprint(str(file))
    assert _encoder(file).fingerprint(str(file)) == before and _encoder(file, "en").identity != encoder.identity
    wavfile.write(tmp_path / "recordings/1.wav", RATE, _written("int16", 0.9 * tones(said(1))))
    assert encoder.fingerprint(str(file)) != before


def test_only_whisper_is_trained_of_the_models_that_hear(tmp_path):
    from transformers import BartConfig, MoonshineConfig

    objective = build_objective("seq2seq")
    assert objective.settled(tmp_path, WhisperConfig()).source == "audio"
    assert objective.settled(tmp_path, BartConfig()).source == "text"
    with pytest.raises(ModelError, match="this is a moonshine"):
        objective.settled(tmp_path, MoonshineConfig())


@pytest.mark.full
def test_error_rates_are_those_counted_by_hand():
    pytest.importorskip("jiwer", reason="the extra tasks")
    written, wanted = ["The quick fox", "a lazy dog dog"], ["the quick brown fox.", "a lazy dog"]
    scores = of_speech(written, wanted)
    # of 7 words: "The" and "fox" are other ones and "brown" is missing; "dog" comes twice
    assert scores["wer"] == pytest.approx(4 / 7) and scores["wer_words"] == pytest.approx(2 / 7)
    assert json.dumps(scores) and scores["cer"] == pytest.approx((1 + 6 + 1 + 4) / (20 + 10))
    assert of_speech(["x"], ["..."])["wer_words"] == 1.0
