"""Answers many prompts in batches, which the ranks share: each generates its own, and all run as many forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.schema import GenerateSettings
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import gather_json, on_main
from fsdp_qlora.inference.end_of_turn import EndOfTurn
from fsdp_qlora.inference.generate import ending, generation_config
from fsdp_qlora.model.root import CausalModel


@dataclass(frozen=True)
class Row:
    """A prompt to answer."""

    index: int
    ids: list[int]
    """Its tokens."""
    adapter: str | None = None
    """The adapter that answers it, of several; None: the one in use."""


def deal(rows: Sequence[Row], batch_size: int, num_ranks: int) -> list[list[list[Row]]]:
    """Return rounds of batches, one batch for each rank, some of them empty in the last round; the longest come first.

    Rows of a batch have similar lengths, so that little is padded, and memory is fullest at the beginning.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.ids), row.index))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    batches += [[]] * (-len(batches) % num_ranks)
    return [batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks)]


@torch.no_grad()
def answer_batch(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn, rows: Sequence[Row],
    settings: GenerateSettings, num_ranks: int = 1,
) -> dict[int, str]:  # fmt: skip
    """Return the answers, without their end markers, by index; the rows are padded on the left.

    With several ranks every rank calls it, with rows of its own, and generates until the last one is done.
    """
    longest = max(len(row.ids) for row in rows)
    padding = tokenizer.pad_token_id
    padding = padding if isinstance(padding, int) else (end.ids or [0])[0]
    ids = torch.full((len(rows), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row.ids) :] = torch.tensor(row.ids)
        mask[number, longest - len(row.ids) :] = 1
    config = generation_config(end, settings)
    config.pad_token_id = padding
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
        synced_gpus=num_ranks > 1, stopping_criteria=ending(tokenizer, end),
    )  # fmt: skip
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return {row.index: end.without(text) for row, text in zip(rows, texts, strict=True)}


def answer_all(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn, rows: Sequence[Row],
    settings: GenerateSettings, seed: int, ranks: Ranks, write: Callable[[dict[int, str]], None],
) -> None:  # fmt: skip
    """Answer all rows; rank 0 calls ``write`` with each round's answers. Every rank calls it with the same rows.

    Rows of one adapter are answered together, so that any kind of adapter may be among them, and each is computed as it
    is alone. Sampled answers depend on the seed, the batch size and the rows that are left, but not on chance.
    """
    was_training = model.training
    model.eval()
    for name in dict.fromkeys(row.adapter for row in rows):
        if name is not None:
            model.use_adapter(name)
        for batches in deal([row for row in rows if row.adapter == name], settings.batch_size, ranks.size):
            mine = batches[ranks.rank]
            torch.manual_seed(seed + (mine or batches[0])[0].index)
            answers = answer_batch(model, tokenizer, end, mine or batches[0][:1], settings, ranks.size)
            gathered = gather_json(list(answers.items()) if mine else [], ranks)
            texts = {int(index): str(text) for of_rank in gathered for index, text in of_rank}
            on_main(partial(write, texts), ranks)  # a full disk ends all ranks
    model.train(was_training)
