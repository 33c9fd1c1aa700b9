"""The batches that all ways of `benchmarks.step` train on: rows of exactly so many tokens of real conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import Piece, TokenRows
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.model.tokenizer import build_tokenizer


class Rows:
    """``count`` rows of ``length`` tokens with their labels."""

    def __init__(self, file: Path) -> None:
        found = json.loads(file.read_text())
        self._ids, self._labels = torch.tensor(found["ids"]), torch.tensor(found["labels"])
        self._lengths: list[list[int]] | None = found.get("lengths")
        self.length = self._ids.shape[1]

    def __len__(self) -> int:
        return self._ids.shape[0]

    def of(self, step: int, rank: int, num_ranks: int, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids and labels, int64 ``[count, length]``, of one rank's step."""
        chosen = self._chosen(step, rank, num_ranks, count)
        return self._ids[chosen], self._labels[chosen]

    def _chosen(self, step: int, rank: int, num_ranks: int, count: int) -> list[int]:
        first = (step * num_ranks + rank) * count
        return [number % len(self) for number in range(first, first + count)]

    def targets(self, step: int, rank: int, num_ranks: int, count: int) -> int:
        """Return the number of supervised tokens of one rank's step."""
        return int((self.of(step, rank, num_ranks, count)[1][:, 1:] != -100).sum())

    def documents(self, step: int, rank: int, num_ranks: int, count: int) -> list[list[Piece]] | None:
        """Return what the rows of one rank's step are made of, if they were packed: (ids, learned) of each document."""
        if self._lengths is None:
            return None
        return [
            list(zip(self._ids[row].split(self._lengths[row]), (self._labels[row] != -100).split(self._lengths[row]),
                     strict=True))
            for row in self._chosen(step, rank, num_ranks, count)
        ]  # fmt: skip

    def lists(self) -> list[tuple[list[int], list[int]]]:
        """Return (input_ids, labels) of every row."""
        return list(zip(self._ids.tolist(), self._labels.tolist(), strict=True))

    def supervised(self) -> float:
        """Return the share of positions whose next token is learned."""
        return float((self._labels[:, 1:] != -100).float().mean())


def write_rows(
    file: Path, length: int, count: int = 24, vocab_size: int | None = None,
    supervised: Callable[[int], bool] | None = None,
) -> None:  # fmt: skip
    """Lay real conversations end to end in rows of ``length`` tokens; ids beyond ``vocab_size`` wrap around.

    ``supervised`` says of each position whether its token is learned; None = the assistant's words.
    """
    folder = cache_folder() / "embedded"
    tokenizer = build_tokenizer(folder / "smollm2-135m-instruct", False)
    settings = DataSettings(train=str(folder / "alpaca_en_demo.jsonl"), eval_fraction=0.0, max_length=4096)
    data = prepare_data(settings, 0, tokenizer, cache_folder())
    assert data.train is not None
    rows = TokenRows(data.train)
    ids: list[int] = []
    labels: list[int] = []
    number = 0
    while len(ids) < length * count:
        batch = rows.collate([number % len(rows)], 0)
        ids += batch.input_ids[0].tolist()
        labels += batch.labels[0].tolist()
        number += 1
    if vocab_size is not None:
        ids = [i % vocab_size for i in ids]
        labels = [label if label < 0 else label % vocab_size for label in labels]
    if supervised is not None:
        labels = [token if supervised(place) else -100 for place, token in enumerate(ids)]
    cut = [slice(i * length, (i + 1) * length) for i in range(count)]
    file.write_text(json.dumps({"ids": [ids[c] for c in cut], "labels": [labels[c] for c in cut]}))


def draw_rows(file: Path, length: int, count: int, vocab_size: int) -> None:
    """Write packed rows of ``length`` random tokens, without any tokenizer or data: documents laid end to end.

    Their lengths are log-normal (median 300, as chats have them), the last of a row is cut; learned is what follows a
    first part of 20 to 60 %, the prompt.
    """
    draw = np.random.default_rng(0)
    ids, labels, lengths = [], [], []
    for _ in range(count):
        row = draw.integers(0, vocab_size, length)
        learned, cut, start = np.zeros(length, dtype=bool), [], 0
        while start < length:
            size = min(length - start, max(2, int(draw.lognormal(5.7, 0.8))))
            learned[start + max(1, int(size * draw.uniform(0.2, 0.6))) : start + size] = True
            cut.append(size)
            start += size
        ids.append(row.tolist())
        labels.append(np.where(learned, row, -100).tolist())
        lengths.append(cut)
    file.write_text(json.dumps({"ids": ids, "labels": labels, "lengths": lengths}))


def small_model(folder: Path, layers: int, vocabulary: int) -> Path:
    """Save a random bf16 Llama as wide as SmolLM2-135M, untied, if it is not there; return its folder."""
    if folder.is_dir():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Put the embedded model's tokenizer beside a random model."""
    build_tokenizer(cache_folder() / "embedded" / "smollm2-135m-instruct", False).save_pretrained(folder)


def random_llama(folder: Path, small: bool) -> Path:
    """Write a Llama of 8 billion random bf16 weights (or a tiny one), file by file, with a tokenizer."""
    from transformers import LlamaConfig

    from benchmarks.loading_rank import write_random

    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    if small:
        shape |= {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 4096}  # fmt: skip
    folder.mkdir()
    write_random(folder, LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16"))
    save_tokenizer(folder)
    return folder
