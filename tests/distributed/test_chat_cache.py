"""A chat feeds only what is new in each turn, and answers as if it had fed everything again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.inference.chat import Reply
from fsdp_qlora.inference.remembered import Remembered
from fsdp_qlora.run.chat import Talk
from fsdp_qlora.run.inference import load_for_inference
from tests.build import config_of, world_of
from tests.distributed.test_many_adapters import make_adapters, stock

LINES = ["the quick brown", "/adapter coder", "the lazy dog", "seven small ships", "/reset", "a stone", "//quit"]
NEW_TOKENS = 9


def _talk(ranks: Ranks, folder: str, adapters: dict[str, str], attention: str) -> Any:
    """Return what is fed in each forward of the first layer: how many tokens."""
    config = config_of(
        folder, precision={"name": "fp32"}, quant={"name": "none", "double_quant": False}, adapter=adapters,
        model={"check": "off", "attn_implementation": attention},
        generate={"max_new_tokens": NEW_TOKENS, "chat": True, "adapter": "poet"},
    )  # fmt: skip
    prepared = load_for_inference(config, {n: Path(f) for n, f in adapters.items()}, world_of(ranks))
    fed: list[int] = []
    layer = prepared.model.base.model.layers[0]
    layer.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].shape[1]))
    answers: list[str] = []

    class Noted(Talk):
        def _answer(self, order: dict[str, Any], stream: bool = False) -> Reply:
            reply = super()._answer(order, False)
            answers.append(reply.text)
            return reply

    Noted(config, prepared).run(iter(LINES), introduce=False)
    return answers, fed


def _wanted(folder: Path, adapters: dict[str, str]) -> tuple[list[str], list[int]]:
    """Answer with stock PEFT, which reads everything anew in each turn; also return the tokens of each prompt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    judge = stock(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapters)
    judge.set_adapter("poet")
    messages: list[dict[str, str]] = []
    answers, lengths = [], []
    for line in LINES:
        if line == "/reset":
            messages = []
        elif line.startswith("/adapter"):
            judge.set_adapter(line.split()[1])
        else:
            messages = [*messages, {"role": "user", "content": line.replace("//", "/")}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = judge.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            prompt = inputs["input_ids"].shape[1]
            text = tokenizer.decode(out[0, prompt:], skip_special_tokens=True).strip()
            messages = [*messages, {"role": "assistant", "content": text}]
            answers.append(text)
            lengths.append(prompt)
    return answers, lengths


@pytest.mark.full
@pytest.mark.parametrize("attention", ["blockwise", "sdpa", "eager"])
def test_each_turn_feeds_what_is_new(pool, tmp_path, tiny_model, attention):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    configs: Any = {
        "poet": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "coder": lambda: peft.LoraConfig(r=2, lora_alpha=8, target_modules=["k_proj", "down_proj"]),
    }
    adapters = make_adapters(base, tmp_path / "adapters", configs)
    # all four ranks: transformers' `generate` asks the whole world whether an answer is unfinished
    answers, fed = pool.run(4, _talk, str(tiny_model), adapters, attention)[0]
    wanted, lengths = _wanted(tiny_model, adapters)
    assert answers == wanted
    prompts = [count for count in fed if count > 1]
    assert len(prompts) == len(lengths)
    assert prompts[:2] == lengths[:2], "another adapter has to read everything itself"
    assert prompts[2] < lengths[2] - lengths[1] + NEW_TOKENS + 3, "the third turn reads its own tokens"
    assert prompts[3] < lengths[3] and prompts[4] < lengths[4] - lengths[3] + NEW_TOKENS + 3


def _cache(length: int, sliding: int = 0) -> DynamicCache:
    cache = DynamicCache()
    if sliding:
        cache.layers = [DynamicSlidingWindowLayer(sliding)]  # type: ignore[list-item]
    states = torch.arange(length, dtype=torch.float32).view(1, 1, -1, 1)
    cache.update(states, states, 0)
    return cache


def test_a_cache_is_cut_to_what_the_prompt_begins_with():
    read = Remembered()
    assert read.take([1, 2, 3], None) is None
    read.keep([1, 2, 3, 4, 5], None, _cache(4))
    cut = read.take([1, 2, 9, 9], None)
    assert cut is not None and cut.get_seq_length() == 2 and read.take([1, 2, 9, 9], None) is None
    for ids, adapter, cache, left in (
        ([1, 2, 3, 4], None, _cache(4), 3),  # one token is left to feed
        ([1, 2, 3, 4, 5, 6], None, _cache(4), 4),
        ([1, 2, 3, 4, 5, 6], "other", _cache(4), None),
        ([7, 2, 3], None, _cache(4), None),
        ([1, 2, 3, 4, 9], None, _cache(4, sliding=8), 4),
        ([1, 2, 9, 9, 9], None, _cache(4, sliding=8), None),
    ):
        read.keep([1, 2, 3, 4, 5], None, cache)
        taken = read.take(ids, adapter)
        assert (None if taken is None else taken.get_seq_length()) == left, ids
