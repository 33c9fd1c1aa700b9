"""The mask is the assistant's words and the token that ends its turn, nothing else."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.data.chat import Example, find_format, read_row
from fsdp_qlora.data.encode import encode
from fsdp_qlora.errors import DataError


@pytest.fixture(scope="module", params=["tiny", pytest.param("real")])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.getfixturevalue(f"{request.param}_model"))


def _learned(tokenizer, example):
    ids, learned = encode(example, tokenizer)
    assert len(ids) == len(learned)
    spans, current = [], []
    for token, flag in zip(ids, learned, strict=True):
        if flag:
            current.append(token)
        elif current:
            spans.append(tokenizer.decode(current))
            current = []
    return spans + ([tokenizer.decode(current)] if current else [])


ROWS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi <|im_end|> there"},
            {"role": "assistant", "content": "Hello, you!"},
            {"role": "user", "content": "More?"},
            {"role": "assistant", "content": "A line\n\nand another é漢 12345"},
        ]
    },
    "conversations": {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello, you!"},
            {"from": "human", "value": "More?"},
            {"from": "gpt", "value": "A line\n\nand another é漢 12345"},
        ]
    },
}


@pytest.mark.parametrize("row_format", ROWS)
def test_chat_rows(tokenizer, row_format):
    row = ROWS[row_format]
    assert find_format(list(row)) == row_format
    found = _learned(tokenizer, read_row(row, row_format))
    assert found == ["Hello, you!<|im_end|>", "A line\n\nand another é漢 12345<|im_end|>"]


def test_alpaca_joins_instruction_and_input(tokenizer):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    example = read_row(row, find_format(list(row)))
    assert example.messages[0]["content"] == "Add.\n\n1 2"
    assert _learned(tokenizer, example) == ["3<|im_end|>"]


def test_pad_equal_to_eos_keeps_the_end_of_turn(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, learned = encode(read_row(ROWS["conversations"], "conversations"), tokenizer)
    ends = [n for n, token in enumerate(ids) if token == tokenizer.eos_token_id and learned[n]]
    assert len(ends) == 2


def test_prompt_completion_and_text(tokenizer):
    found = _learned(tokenizer, Example(prompt="The sky is", completion=" blue"))
    assert found == [" blue<|im_end|>"]
    assert _learned(tokenizer, read_row({"text": "all of it"}, "text")) == ["all of it<|im_end|>"]


def test_an_answer_cut_off_is_not_supervised(tokenizer):
    assert _learned(tokenizer, Example(messages=[{"role": "user", "content": "only a question"}])) == []


@pytest.mark.parametrize(
    ("row", "row_format", "word"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "wizard"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "expected text"),
        ({"messages": "hello"}, "messages", "does not match data.format"),
        ({"instruction": "x"}, "alpaca", "'output'"),
        ({"prompt": None, "completion": "x"}, "prompt_completion", "expected text"),
    ],
)
def test_bad_rows_are_named(row, row_format, word):
    with pytest.raises(DataError, match=word):
        read_row(row, row_format)


def test_unknown_columns_are_named():
    with pytest.raises(DataError, match="question, reply"):
        find_format(["question", "reply"])


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}" + original
    try:
        with pytest.raises(DataError, match="rewrites earlier turns"):
            encode(read_row(ROWS["messages"], "messages"), tokenizer)
    finally:
        tokenizer.chat_template = original


def test_conversations_that_the_assistant_opens_have_prompts_of_their_own():
    rows = [[("assistant", f"hello {n}"), ("user", "hi")] for n in range(2)]
    keys = {Example([{"role": role, "content": content} for role, content in row]).prompt_key for row in rows}
    assert len(keys) == 2
