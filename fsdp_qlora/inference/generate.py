"""Answers a prompt through the chat template: greedy or sampled, streamed or returned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

from fsdp_qlora.config.schema import GenerateSettings
from fsdp_qlora.data.messages import require_unicode
from fsdp_qlora.errors import DataError
from fsdp_qlora.inference.end_of_turn import EndOfTurn
from fsdp_qlora.inference.remembered import Remembered
from fsdp_qlora.inference.rendering import render_all_apart, require_none
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.shown import visible


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, torch.Tensor]:
    """Return the model's inputs for a user's prompt."""
    (ids,) = encode_conversations(tokenizer, [[{"role": "user", "content": prompt}]])
    inputs = torch.tensor([ids])
    return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], names: Sequence[str] = ()
) -> list[list[int]]:  # fmt: skip
    """Render conversations with the chat template, up to the answer; without one, the text of their last messages.

    Raises:
        ModelError: if the chat template rejects one, or its text is no Unicode, by its name if it has one.
    """
    if not conversations:
        return []
    if tokenizer.chat_template:
        texts = render_all_apart(tokenizer, conversations, names, add_generation_prompt=True)
    else:
        texts = [str(messages[-1].get("content", "")) for messages in conversations]
    require_none(_not_unicode(texts), names, "its tokenizer")
    encoded = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)
    return [list(ids) for ids in encoded["input_ids"]]  # type: ignore[union-attr, arg-type]


def _not_unicode(texts: Sequence[str]) -> dict[int, str]:
    """Return what is wrong with texts that hold half a character, by their places."""
    wrong: dict[int, str] = {}
    for place, text in enumerate(texts):
        try:
            require_unicode(text)
        except DataError as error:
            wrong[place] = str(error)
    return wrong


def answer(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn, prompt: str, settings: GenerateSettings,
    stream: bool = False,
) -> str:  # fmt: skip
    """Return the model's answer to a user's prompt; see `answer_ids`."""
    ids = encode_prompt(tokenizer, prompt)["input_ids"][0].tolist()
    return answer_ids(model, tokenizer, end, ids, settings, stream)


@torch.no_grad()
def answer_ids(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn, ids: list[int],
    settings: GenerateSettings, stream: bool = False, stopped: Callable[[], bool] | None = None,
    read: Remembered | None = None, adapter: str | None = None,
) -> str:  # fmt: skip
    """Return the model's answer to a tokenized prompt, without its end; with ``stream``, also print it as it comes.

    Under FSDP every rank must call it with the same arguments; for sampled answers, with the same torch seed.

    Args:
        model: the model.
        tokenizer: decodes the answer.
        end: what ends it.
        ids: the prompt's tokens.
        settings: length and sampling.
        stream: whether to print the answer token by token.
        stopped: asked after each token; if it returns True, the answer ends there. Must agree on all ranks.
        read: what the model has read already; afterwards, also this prompt and its answer.
        adapter: the adapter in use, if there are several: what was read with another one is of no use.
    """
    inputs = torch.tensor([ids], device=model.device)
    was_training = model.training
    model.eval()
    more: dict[str, Any] = {"streamer": _Streamer(tokenizer, *end.texts)} if stream else {}
    if read is not None and (cache := read.take(ids, adapter)) is not None:
        more["past_key_values"] = cache
    ends = ending(tokenizer, end)
    if stopped is not None:
        ends.append(_Stopped(stopped))
    config = generation_config(end, settings)
    config.return_dict_in_generate = True
    out: Any = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=config,
        stopping_criteria=ends,
        **more,
    )
    model.train(was_training)
    sys.stdout.flush()
    if read is not None:
        read.keep(out.sequences[0].tolist(), adapter, out.past_key_values)
    return end.without(str(tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)))


def generation_config(end: EndOfTurn, settings: GenerateSettings) -> GenerationConfig:
    """Return transformers' settings: greedy at temperature 0, with a KV cache, and stopping at end tokens."""
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:  # top_k=0 explicitly: transformers' own default is 50
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens, eos_token_id=end.ids or None, use_cache=True,
        pad_token_id=end.ids[0] if end.ids else None, **sampling,
    )  # fmt: skip


def ending(tokenizer: PreTrainedTokenizerBase, end: EndOfTurn) -> StoppingCriteriaList:
    """Return what sees that an answer has reached an end text.

    It's not ``stop_strings`` in the settings: with that `generate` sends the tokenizer on to the model's attention.
    """
    return StoppingCriteriaList([StopStringCriteria(tokenizer, end.texts)] if end.texts else [])


class _Stopped(StoppingCriteria):
    """Ends an answer when asked to."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self._stopped(), dtype=torch.bool, device=input_ids.device)


class _Streamer(TextStreamer):
    """Prints an answer as it is generated, without its end text: a possible start of the end is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *ends: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._end, self._held, self._ended = EndOfTurn([], stops=ends), "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text that does not belong to the end."""
        text = "" if self._ended else self._held + text
        shown = self._end.cut(text)
        self._ended = self._ended or len(shown) < len(text)
        kept = 0 if self._ended or stream_end else max((_overlap(shown, end) for end in self._end.texts), default=0)
        shown, self._held = shown[: len(shown) - kept], shown[len(shown) - kept :]
        super().on_finalized_text(visible(shown), stream_end)


def _overlap(text: str, end: str) -> int:
    """Return how many trailing characters of ``text`` could be the start of ``end``."""
    return next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)
