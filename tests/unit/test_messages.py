"""Nothing in a message is lost without a word: it is harmless, it is honoured, the template writes it, or it is refused."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.chat import read_row
from fsdp_qlora.data.encode import encode
from fsdp_qlora.data.messages import HARMLESS
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.errors import DataError

REASONING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif -%}"
    "{{ m.content }}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"
)
CALLS = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%% for c in m.tool_calls or [] %%}{{ %s }}{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def _row(**extra):
    return {"messages": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42", **extra}]}


def _learned(row, tokenizer, train_on="assistant", ignored=()):
    ids, learned = encode(read_row(row, "auto", frozenset(ignored)), tokenizer, train_on)
    return tokenizer.decode(ids[learned])


def test_reasoning_is_learned_where_the_template_writes_it(tokenizer):
    tokenizer.chat_template = REASONING
    row = _row(reasoning_content="six sevens")
    assert _learned(row, tokenizer) == "<think>\nsix sevens\n</think>\n\n42<|im_end|>"
    assert _learned(_row(reasoning_content=None), tokenizer) == "42<|im_end|>"
    only = _row(content="", reasoning_content="six sevens")
    assert _learned(only, tokenizer) == "<think>\nsix sevens\n</think>\n\n<|im_end|>"


@pytest.mark.parametrize("row", [
    _row(reasoning_content="six sevens"), _row(thinking="six sevens"), _row(thoughts=["a", "b"]), _row(audio={"id": "x"}),
    _row(tool_calls=[{"function": {"name": "f", "arguments": {}}}]), _row(function_call={"name": "f", "arguments": "{}"}),
    _row(refusal="no"), _row(loss_mask=[0, 1]), _row(train_detail=[{"begin_offset": 0}]), _row(masked=True), _row(new_key=0),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "thought": "hm"}]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a", "thought": "hm"}]},
    {"messages": [{"role": "user", "content": "q", "image": "x.png"}, {"role": "assistant", "content": "a"}]},
])  # fmt: skip
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_what_the_template_does_not_write_is_refused_by_name(tokenizer, row, train_on):
    turns = next(iter(row.values()))
    known = {"role", "content", "from", "value"}
    (key,) = {key for turn in [*turns, *row.get("completion", [])] for key in turn} - known
    with pytest.raises(
        DataError, match=f"message [12] has the key '{key}', which the chat template does not write"
    ) as said:
        _learned(row, tokenizer, train_on)
    assert f"data.ignore_keys=[{key}]" in str(said.value) and "data.template=FILE" in str(said.value)
    assert _learned(row, tokenizer, train_on, ignored=[key])


def test_a_message_that_is_not_written_names_file_and_line(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(_row()) + "\n" + json.dumps(_row(reasoning_content="hm")) + "\n")
    settings = {"train": str(file), "max_length": 512}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: message 2 has the key 'reasoning_content'"):
        prepare_data(DataSettings(**settings), 0, tokenizer, tmp_path / "cache")
    for settings["on_bad_row"], settings["ignore_keys"], kept in (("skip", [], 1), ("error", ["reasoning_content"], 2)):
        data = prepare_data(DataSettings(**settings), 0, tokenizer, tmp_path / "cache")
        assert data.train_counts.kept == kept


def test_reasoning_of_an_earlier_turn_that_the_template_drops_is_refused(tokenizer):
    """As Qwen3: the reasoning of answers before the last question is left out."""
    tokenizer.chat_template = REASONING.replace("and m.reasoning_content", "and m.reasoning_content and loop.last")
    row = {"messages": _row(reasoning_content="one")["messages"] + _row(reasoning_content="two")["messages"]}
    with pytest.raises(DataError, match=r"drops or changes part of this answer \(message 2\).*data.train_on=last"):
        _learned(row, tokenizer)
    assert _learned(row, tokenizer, "last") == "<think>\ntwo\n</think>\n\n42<|im_end|>"


def test_harmless_keys_change_nothing(tokenizer):
    plain = _learned(_row(), tokenizer)
    for key in HARMLESS:
        assert _learned(_row(**{key: "x"}), tokenizer) == plain
    for nothing in (None, "", [], {}):
        assert _learned(_row(unknown=nothing), tokenizer) == plain


def test_a_harmless_key_is_still_there_for_the_template(tokenizer):
    tokenizer.chat_template = REASONING.replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}")
    assert _learned(_row(name="Ada"), tokenizer).startswith("Ada: 42")


def _two(first, second):
    turns = [("user", "a", {}), ("assistant", "one", first), ("user", "b", {}), ("assistant", "two", second)]
    return {"messages": [{"role": role, "content": content, **extra} for role, content, extra in turns]}


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "learn", "loss"])
@pytest.mark.parametrize("values", [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_a_message_says_whether_it_is_learned(tokenizer, key, values):
    first, second = ({key: value} for value in values)
    assert _learned(_two(first, second), tokenizer) == "two<|im_end|>"
    assert _learned(_two(second, first), tokenizer) == "one<|im_end|>"
    assert _learned(_two(second, first), tokenizer, "last") == ""
    assert _learned(_two(first, second), tokenizer, ignored=[key]) == "one<|im_end|>two<|im_end|>"
    with pytest.raises(DataError, match=r"message 2 is marked as not to be learned, but data.train_on=all"):
        _learned(_two(first, second), tokenizer, "all")


@pytest.mark.parametrize("value", [0.5, 2, -1, "1", "no", [1]])
def test_a_weight_between_is_refused(value):
    with pytest.raises(DataError, match=r"'weight' is .* only 0 and 1"):
        read_row(_row(weight=value), "auto")


def test_a_user_is_not_learned_whatever_the_row_says():
    row = {"conversations": [{"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "a", "weight": 1}]}
    assert read_row(row, "auto").not_learned == {0}
    row["conversations"][0]["weight"] = 1
    with pytest.raises(DataError, match="'weight' asks to learn a user message"):
        read_row(row, "auto")


ARGUMENTS = {"city": "Tromsø", "days": [1, 2], "all": True, "none": None}
WRITTEN = '{"city": "Tromsø", "days": [1, 2], "all": true, "none": null}'


@pytest.mark.parametrize("writes", [
    "c.function.arguments | tojson",
    "c.function.arguments if c.function.arguments is string else (c.function.arguments | tojson)",
    "'' + c.function.arguments",  # DeepSeek: a text is appended
    "'' ~ c.function.arguments",  # an object would be written as Python writes it: {'city': ...}
])  # fmt: skip
@pytest.mark.parametrize("stored", ["object", "text", "calls as text", "no function around it"])
def test_arguments_are_encoded_exactly_once(tokenizer, writes, stored):
    tokenizer.chat_template = CALLS % writes
    calls = [{"id": "1", "function": {"name": "f", "arguments": ARGUMENTS}}]
    if stored == "text":
        calls[0]["function"]["arguments"] = json.dumps(ARGUMENTS)
    elif stored == "calls as text":
        calls = json.dumps(calls)
    elif stored == "no function around it":
        tokenizer.chat_template = (CALLS % writes).replace("c.function.", "c.")
        calls = [{"name": "f", "arguments": json.dumps(ARGUMENTS)}]
    assert _learned(_row(content=None, tool_calls=calls), tokenizer) == f"{WRITTEN}<|im_end|>"


def test_arguments_that_are_no_json_stay_as_they_are(tokenizer):
    tokenizer.chat_template = CALLS % "c.function.arguments"
    for text in ("{broken", "3 kg", "Oslo"):
        calls = [{"function": {"name": "f", "arguments": text}}]
        assert _learned(_row(content="", tool_calls=calls), tokenizer) == f"{text}<|im_end|>"


def test_settings_of_the_template_come_with_the_row(tokenizer):
    tokenizer.chat_template = "{{ 'no thinking\n' if enable_thinking is false }}" + REASONING
    for settings in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        ids, _ = encode(read_row(_row() | {"chat_template_kwargs": settings}, "auto"), tokenizer)
        assert tokenizer.decode(ids).startswith("no thinking\n")
    with pytest.raises(DataError, match="chat_template_kwargs"):
        read_row(_row() | {"chat_template_kwargs": 3}, "auto")


PARTS = [{"type": "text", "text": "4"}, {"type": "text", "text": "2", "image_url": None}]


@pytest.mark.parametrize("content", [PARTS, ["4", "2"], [{"text": "42"}], [{"type": "output_text", "text": "42"}]])
def test_parts_of_a_text_are_joined(tokenizer, content):
    assert _learned(_row(content=content), tokenizer) == "42<|im_end|>"


@pytest.mark.parametrize(("content", "said"), [
    ([{"type": "image_url", "image_url": {"url": "x"}}], "part 1 of the content has type 'image_url'"),
    ([*PARTS, {"type": "image"}], "part 3 of the content has type 'image'; only text"),
    ([{"type": "text", "image": "x"}], "part 1 of the content has no 'text', only image; only text"),
    ([{"video": "x", "fps": 2}], "part 1 of the content has no 'text', only video, fps; only text"),
    ([3], "got int as part 1"), ({"text": "42"}, "expected text, got dict"), ([{"type": "text", "text": 3}], "got int"),
])  # fmt: skip
def test_other_parts_are_refused(content, said):
    with pytest.raises(DataError, match=said):
        read_row(_row(content=content), "auto")


def test_either_spelling_of_turns_is_read_under_either_name():
    openai = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for column in ("messages", "conversations"):
        for turns in (openai, sharegpt, json.dumps(openai), [json.dumps(turn) for turn in sharegpt]):
            assert read_row({column: turns}, "auto").messages == openai


def test_an_alpaca_history_comes_before_the_question():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    assert [m["content"] for m in read_row(row, "auto").messages] == ["s", "a", "b", "c", "d"]


def test_a_chosen_conversation_that_repeats_the_prompt_has_it_once():
    chosen = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
    row = {"prompt": "q", "chosen": chosen, "rejected": [*chosen[:1], {"role": "assistant", "content": "bad"}]}
    assert read_row(row, "auto").messages == chosen
    assert read_row({**row, "chosen": chosen[1:]}, "auto").messages == chosen


def test_turns_of_another_spelling_name_their_keys():
    with pytest.raises(DataError, match=r"the keys speaker, text, but neither role and content nor from and value"):
        read_row({"conversations": [{"speaker": "a", "text": "b"}]}, "auto")


def test_content_that_the_template_leaves_out_beside_a_call_is_refused(tokenizer):
    """As Llama 3.1: a message with a call is written without its content."""
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    both = CALLS % "c.function.arguments | tojson"
    tokenizer.chat_template = both
    assert _learned(_row(tool_calls=calls), tokenizer) == '42{"a": 1}<|im_end|>'
    tokenizer.chat_template = both.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    with pytest.raises(
        DataError, match="message 2 has both content and tool_calls, but the chat template does not write"
    ):
        _learned(_row(tool_calls=calls), tokenizer)
    assert _learned(_row(content=" ", tool_calls=calls), tokenizer) == '{"a": 1}<|im_end|>'


def test_answers_in_the_prompt_of_a_completion_are_not_learned(tokenizer):
    turns = _two({}, {})["messages"]
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert _learned(row, tokenizer) == _learned(row, tokenizer, "last") == "two<|im_end|>"
    assert _learned(row, tokenizer, "all").startswith("<|im_start|>user")
