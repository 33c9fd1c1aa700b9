"""Recordings made on the spot, a tone for each word, and tiny random Whispers that hear them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from tests.tiny import WORDS, sentence

RATE, SECONDS = 16_000, 1
"""Samples a second, and the longest recording that a tiny Whisper hears."""
_TONE = 0.1
"""Seconds of a word."""


def tones(text: str, rate: int = RATE) -> np.ndarray:
    """Return a text as float32 samples: each word is a tone of its own."""
    at = np.arange(int(_TONE * rate)) / rate
    return np.concatenate([0.5 * np.sin(2 * np.pi * (300 + 150 * WORDS.index(word)) * at) for word in text.split()])


def said(number: int) -> str:
    """Return what is said in recording ``number``."""
    return sentence(number, 2 + number % 5)


def write_recordings(folder: Path, count: int) -> Path:
    """Write recordings, and the rows that name them; return the file of the rows."""
    (folder / "recordings").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = f"recordings/{number}.wav"
        wavfile.write(folder / name, RATE, (tones(said(number)) * 32767).astype(np.int16))
        rows.append({"audio": name, "text": said(number)})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_whisper_tokenizer() -> WhisperTokenizer:
    """Return a byte-level BPE trained on a few sentences, with Whisper's own tokens in Whisper's order."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([sentence(n, 12) for n in range(50)], trainer)
    learned = json.loads(core.to_str())["model"]
    vocab = dict(learned["vocab"])
    own = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES)]
    own += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    for token in own:
        vocab[token] = len(vocab)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]], pad_token=own[0])
    tokenizer.add_tokens(own, special_tokens=True)
    return tokenizer


def write_whisper(folder: Path, several: bool = False, std: float = 0.08, **more: Any) -> Path:
    """Write a tiny Whisper with random bf16 weights and its processor.

    ``several``: it knows several languages. ``std``: that of its weights; with large ones it says many things.
    """
    tokenizer = make_whisper_tokenizer()
    known: dict[str, int] = tokenizer.get_vocab()
    start, end = known["<|startoftranscript|>"], known["<|endoftext|>"]
    settings = {
        "vocab_size": len(tokenizer), "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_source_positions": 50 * SECONDS, "max_target_positions": 48, "num_mel_bins": 40, "dropout": 0.0,
        "decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
        "suppress_tokens": None, "begin_suppress_tokens": None, **more,
    }  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**settings)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that every part of the model matters
            if parameter.dim() > 1 and "encoder.embed_positions" not in name:
                nn.init.normal_(parameter, std=std)
    languages = {f"<|{code}|>": known[f"<|{code}|>"] for code in LANGUAGES}
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, return_timestamps=False,
        no_timestamps_token_id=known["<|notimestamps|>"], is_multilingual=several, max_length=48,
        suppress_tokens=[number for token, number in known.items() if token.startswith("<|") and number != end],
        begin_suppress_tokens=[known["Ġ"], end],
        **({"lang_to_id": languages, "task_to_id": {t: known[f"<|{t}|>"] for t in ("translate", "transcribe")}}
           if several else {}),
    )  # fmt: skip
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=40, sampling_rate=RATE, chunk_length=SECONDS)
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def processor_of(folder: Path) -> WhisperProcessor:
    """Return upstream's own processor of a folder."""
    return WhisperProcessor.from_pretrained(folder)
