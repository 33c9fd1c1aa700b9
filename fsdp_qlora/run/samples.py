"""The prompts that a run answers before and after training: those asked for, and some of the held-out rows'."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.inference.generate import encode_conversations
from fsdp_qlora.inference.rendering import render_apart

_LOOKED_AT = 24
"""Held-out rows to look at for prompts."""
_LONGEST = 400
"""Characters of a prompt that is still good to read."""
_MORE_TOKENS = 8
"""Tokens that an answer may have beyond those of the answer wanted."""
_MARK = "Zqxj7"
"""A placeholder prompt that no template writes on its own or trims."""


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt to answer."""

    text: str
    wanted: str | None = None
    """The answer in the held-out row."""
    max_tokens: int | None = None
    """Tokens that the answer may take; None: ``train.sample_tokens``."""


def held_out_prompts(rows: TokenRows, tokenizer: PreTrainedTokenizerBase, count: int) -> list[SamplePrompt]:
    """Return up to ``count`` prompts of rows that are one prompt and its answer, with the answers wanted.

    Rows with a system message or several turns are passed over: their prompt cannot be typed as ``prompt=``.

    Raises:
        ModelError: if the chat template rejects a prompt.
    """
    if not count:
        return []
    before, after = _around(tokenizer)
    read: dict[str, tuple[list[int], list[int]]] = {}
    for number in range(min(_LOOKED_AT, len(rows))):
        ids, learned = (column.tolist() for column in rows.row(number))
        runs = [(is_learned, len(list(part))) for is_learned, part in groupby(learned)]
        if len(runs) < 2 or runs[0][0]:
            continue
        start, length = runs[0][1], runs[1][1]
        text = str(tokenizer.decode(ids[:start]))
        prompt = text[len(before) : len(text) - len(after)]
        if text == f"{before}{prompt}{after}" and 0 < len(prompt) <= _LONGEST:
            read.setdefault(prompt, (ids[:start], ids[start : start + length]))
    again = encode_conversations(tokenizer, [[{"role": "user", "content": prompt}] for prompt in read])
    exact = [prompt for prompt, ids in zip(read, again, strict=True) if ids == read[prompt][0]]
    return [
        SamplePrompt(
            prompt, str(tokenizer.decode(read[prompt][1], skip_special_tokens=True)).strip(),
            len(read[prompt][1]) + _MORE_TOKENS,
        )
        for prompt in exact[:count]
    ]  # fmt: skip


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what the chat template writes before a user's prompt, and after it, up to the answer."""
    if not tokenizer.chat_template:
        return "", ""
    messages = [{"role": "user", "content": _MARK}]
    before, _, after = render_apart(tokenizer, messages, add_generation_prompt=True).partition(_MARK)
    return before, after
