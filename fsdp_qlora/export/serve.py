"""Answers: a prompt through the chat template, greedy or sampled, streamed or returned."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from fsdp_qlora.model.causal import CausalModel
from fsdp_qlora.model.skeleton import end_of_turn_ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, torch.Tensor]:
    """Render a user's prompt as the model's chat expects it (as plain text where there is no chat template)."""
    if not tokenizer.chat_template:
        return dict(tokenizer(prompt, return_tensors="pt"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return dict(tokenizer(text, add_special_tokens=False, return_tensors="pt"))


@torch.no_grad()
def answer(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: bool = False,
) -> str:
    """Return the model's answer; with ``stream``, print it as it comes.

    Under FSDP every rank calls it with the same arguments (greedy, or all would sample apart).
    """
    inputs = {k: v.to(model.device) for k, v in encode_prompt(tokenizer, prompt).items() if k != "token_type_ids"}
    ends = end_of_turn_ids(model.base.config, tokenizer)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else None, **sampling
    )
    was_training = model.training
    model.eval()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None  # type: ignore[arg-type]
    out = model.generate(**inputs, generation_config=config, streamer=streamer)
    model.train(was_training)
    sys.stdout.flush()
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()  # type: ignore[union-attr]
