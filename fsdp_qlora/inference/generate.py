"""Answers a prompt through the chat template: greedy or sampled, streamed or returned."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from fsdp_qlora.inference.end_of_turn import EndOfTurn
from fsdp_qlora.inference.rendering import render_all_apart
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.shown import visible


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, torch.Tensor]:
    """Return the model's inputs for a user's prompt."""
    (ids,) = encode_conversations(tokenizer, [[{"role": "user", "content": prompt}]])
    inputs = torch.tensor([ids])
    return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]]
) -> list[list[int]]:  # fmt: skip
    """Render conversations with the chat template, up to the answer; without one, the text of their last messages.

    Raises:
        ModelError: if the chat template rejects one.
    """
    if not conversations:
        return []
    if tokenizer.chat_template:
        texts = render_all_apart(tokenizer, conversations, add_generation_prompt=True)
    else:
        texts = [str(messages[-1].get("content", "")) for messages in conversations]
    encoded = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)
    return [list(ids) for ids in encoded["input_ids"]]  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def answer(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    end: EndOfTurn,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: bool = False,
) -> str:
    """Return the model's answer without its end marker; with ``stream``, also print it as it is generated.

    Under FSDP every rank must call it with the same arguments, and greedily: sampling would differ between ranks.
    """
    inputs = {k: v.to(model.device) for k, v in encode_prompt(tokenizer, prompt).items()}
    config = generation_config(end, max_new_tokens, temperature, top_p)
    was_training = model.training
    model.eval()
    streamer = _Streamer(tokenizer, end.text or "") if stream else None
    reads_text = {"tokenizer": tokenizer} if end.text else {}
    out = model.generate(**inputs, generation_config=config, streamer=streamer, **reads_text)
    model.train(was_training)
    sys.stdout.flush()
    text = str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return end.without(text)


def generation_config(end: EndOfTurn, max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
    """Return transformers' settings: greedy at temperature 0, and stopping where an answer ends."""
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=end.ids or None, pad_token_id=end.ids[0] if end.ids else None,
        stop_strings=[end.text] if end.text else None, **sampling,
    )  # fmt: skip


class _Streamer(TextStreamer):
    """Prints an answer as it is generated, without its end text: a possible start of the end is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._end, self._held, self._ended = end, "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text that does not belong to the end."""
        if self._ended:
            text = ""
        elif self._end:
            text = self._held + text
            text, ended, _ = text.partition(self._end)
            self._ended = bool(ended)
            kept = 0 if ended or stream_end else _overlap(text, self._end)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        super().on_finalized_text(visible(text), stream_end)


def _overlap(text: str, end: str) -> int:
    """Return how many trailing characters of ``text`` could be the start of ``end``."""
    return next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)
