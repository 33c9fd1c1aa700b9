"""An answer ends where anything says so: tokenizer, config, generation_config.json, chat template."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.config.schema import GenerateSettings
from fsdp_qlora.inference.end_of_turn import EndOfTurn, end_of_turn
from fsdp_qlora.inference.generate import _Streamer, answer, encode_prompt
from tests import tiny


@pytest.fixture
def tokenizer(tmp_path):
    tiny.make_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(str(tmp_path))


CONFIGS = {
    "nothing": (None, None, [2]),
    "an id in the config": (7, None, [2, 7]),
    "a list in the config": ([7, 8], None, [2, 7, 8]),
    "the generation config alone": (None, 9, [2, 9]),
    "a list in the generation config": (None, [9, 2, 10], [2, 9, 10]),
    "all": ([7, 2], [9, 7], [2, 7, 9]),
    "nonsense": ("x", [None, True, -1, "9"], [2]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_union_of_what_names_an_end(tmp_path, tokenizer, case):
    configured, generation, expected = CONFIGS[case]
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    found = end_of_turn(tmp_path, SimpleNamespace(eos_token_id=configured), tokenizer)
    assert found == EndOfTurn(expected)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_generation_config_is_no_obstacle(tmp_path, tokenizer, text):
    (tmp_path / "generation_config.json").write_text(text)
    assert end_of_turn(tmp_path, SimpleNamespace(), tokenizer).ids == [2]


def test_the_end_of_the_text_part_counts(tmp_path, tokenizer):
    config = SimpleNamespace(eos_token_id=None, get_text_config=lambda: SimpleNamespace(eos_token_id=11))
    assert end_of_turn(tmp_path, config, tokenizer).ids == [2, 11]


_TURN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}"
TEMPLATES = {
    "a token of its own": ("'<|im_start|>\\n'", [1, 0], None),
    "the tokenizer's": ("eos_token", [0], None),
    "a space before it": ("' <|im_end|>\\n'", [2, 0], None),
    "text": ("'<|end of turn|>\\n'", [0], "<|end of turn|>"),
    "a line of text": ("'\\n### End\\n'", [0], "### End"),
    "white space": ("'\\n\\n'", [0], None),
    "nothing": ("''", [0], None),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_what_the_template_writes_after_an_answer_counts_first(tmp_path, tokenizer, case):
    end, ids, text = TEMPLATES[case]
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = _TURN.replace("END", end)
    assert end_of_turn(tmp_path, SimpleNamespace(), tokenizer) == EndOfTurn(ids, text)


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "{{ messages[5].content }}", "{{ 'fixed' }}"]
)
def test_a_template_that_gives_no_answer_says_nothing(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    assert end_of_turn(tmp_path, SimpleNamespace(), tokenizer) == EndOfTurn([2])


@pytest.mark.parametrize(
    "pieces", [["the fox", " <|e", "nd|> and", " more"], ["the fox <|end|>"], ["the fox <|end", "|>"]]
)
def test_a_streamed_answer_is_shown_without_its_end(tokenizer, capsys, pieces):
    streamer = _Streamer(tokenizer, "<|end|>")
    for piece in pieces:
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "the fox \n"


def test_the_end_that_comes_first_is_the_one(tokenizer, capsys):
    streamer = _Streamer(tokenizer, "<|end|>", "Human:")
    for piece in ("the fox <|Hu", "man: and <|end|>", " more"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "the fox <|\n"


def test_what_only_begins_like_an_end_is_shown(tokenizer, capsys):
    streamer = _Streamer(tokenizer, "<|end|>")
    for piece in ("a <|", "e", " b <|en"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "a <|e b <|en\n"


def test_generate_stops_there(tiny_model, tmp_path):
    """Tokens and texts that a free answer holds end it, once they are named."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    inputs = encode_prompt(tokenizer, "the quick")
    torch.manual_seed(0)
    free = model.generate(**inputs, max_new_tokens=24, eos_token_id=None, do_sample=True, temperature=9.0, top_k=0)
    free = free[0, inputs["input_ids"].shape[1] :].tolist()
    tokenizer.eos_token, unused = None, next(i for i in range(384) if i not in free)

    def said(end: EndOfTurn) -> str:
        torch.manual_seed(0)
        return answer(model, tokenizer, end, "the quick", GenerateSettings(max_new_tokens=24, temperature=9.0))

    whole = said(EndOfTurn([unused]))
    assert len(whole) > 8
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": free[9]}))
    tokenizer.chat_template = None
    end = end_of_turn(tmp_path, SimpleNamespace(), tokenizer)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    stopped = tokenizer.decode(free[: free.index(free[9])], skip_special_tokens=True).strip()
    assert said(end).startswith(stopped) and len(said(end)) < len(whole)
    text = whole[4:7]
    assert said(EndOfTurn([unused], text)) == whole.partition(text)[0].strip()
    assert said(EndOfTurn([unused], whole[6:8], (text, "not there"))) == whole.partition(text)[0].strip()
