"""Writes targets with an encoder-decoder: greedily, in batches that the ranks share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fsdp_qlora.data.columns import ColumnRows
from fsdp_qlora.data.pairs import LABELS, SUPERVISED, TARGET
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json
from fsdp_qlora.model.config import load_generation_config
from fsdp_qlora.model.root import CausalModel

_TOKENS = (
    "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
"""What greedy decoding takes over from a model's own settings: tokens that begin or end a text, or never occur."""


def greedy_config(folder: Path, model: PreTrainedModel, more: Mapping[str, Any]) -> GenerationConfig:
    """Return settings to write greedily with the model in ``folder``: of its own, only those about tokens; and `more`.

    Raises:
        ModelError: if its generation_config.json cannot be read.
    """
    own = load_generation_config(folder) or GenerationConfig.from_model_config(model.config)
    tokens = {name: value for name in _TOKENS if (value := getattr(own, name, None)) is not None}
    return GenerationConfig(do_sample=False, num_beams=1, use_cache=True, **tokens, **more)


@torch.no_grad()
def write_targets(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, rows: ColumnRows, chosen: Sequence[int],
    config: GenerationConfig, batch_size: int, ranks: Ranks,
) -> list[tuple[str, str]]:  # fmt: skip
    """Return, for each chosen row, the target that the model writes, and the row's own. Every rank calls it.

    Each rank writes for rows of its own, and goes on until the last one is done.
    """
    was_training = model.training
    model.eval()
    texts: dict[int, str] = {}
    for batches in _rounds(rows, chosen, batch_size, ranks.size):
        mine = batches[ranks.rank]
        tensors = rows.collate(mine or batches[0][:1], 0).to(model.device).tensors
        inputs: dict[str, Any] = {name: x for name, x in tensors.items() if name not in (LABELS, SUPERVISED)}
        with _without_lengths_told():
            ids = model.generate(**inputs, generation_config=config, synced_gpus=ranks.size > 1)
        own = dict(zip(mine, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=False))
        texts |= {int(row): str(text) for part in gather_json(list(own.items()), ranks) for row, text in part}
    model.train(was_training)
    return [(texts[row].strip(), str(rows.row(row)[TARGET]).strip()) for row in chosen]


@contextmanager
def _without_lengths_told() -> Iterator[None]:
    """Hide a line that Whisper's code causes in each batch: it fills in a default length, which is then overruled."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Both `max_new_tokens`")

    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _rounds(rows: ColumnRows, chosen: Sequence[int], batch_size: int, num_ranks: int) -> Iterator[list[list[int]]]:
    """Yield a batch for each rank, some of them empty in the last round; rows of similar length are together."""
    ordered = sorted(chosen, key=lambda row: (-int(rows.lengths[row]), row))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    batches += [[]] * (-len(batches) % num_ranks)
    yield from (batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks))
