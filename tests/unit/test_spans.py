"""An answer's span is what the template writes for it, for every kind of template and of tokenizer."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fsdp_qlora.data.chat import Example, read_row
from fsdp_qlora.data.encode import encode
from fsdp_qlora.data.spans import learned_spans
from fsdp_qlora.data.template import ChatTemplate
from fsdp_qlora.errors import DataError
from tests import tokenizers

make = cache(tokenizers.make)

ANSWERS = {
    "words": "price 10 is now 8 euro",
    "code": tokenizers.CODE.rstrip(),
    "indented": "    if x:\n        return 1\n\n\n        return   2",
    "spaces at its ends": "  quick  ",
    "line breaks at its ends": "\n\nquick\n\n",
    "one space": " ",
    "special tokens": "price <s>10</s> is <|im_end|> now </s>",
    "scripts": "é漢 ﬁ 👩‍👧 שלום",
    "the header again": "<|im_start|>assistant\nfox",
    "as the question": "fix",
}


def _example(*answers, first="user"):
    messages = [{"role": "user", "content": "fix"}] if first == "user" else []
    for number, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"more {number}"}] if number else []
        messages.append({"role": "assistant", "content": answer})
    return read_row({"messages": messages}, "messages")


def _text(example, tokenizer):
    return tokenizer.apply_chat_template(example.messages, tokenize=False)


def _spans(example, tokenizer, train_on="assistant"):
    """Return the learned texts, by their places in the rendered text."""
    conversation = ChatTemplate(tokenizer).settled(example)
    turns = [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]
    spans = learned_spans(conversation, turns[-1:] if train_on == "last" else turns)
    return [conversation.text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_all_of_an_answer_and_its_end_are_learned_and_nothing_else(kind, answer):
    """The tokens before the answer are those of the prompt alone, and what follows its end is not learned."""
    tokenizer, said = make(kind), ANSWERS[answer]
    for example in (_example(said), _example("fox", said), _example(said, "fox")):
        ids, learned = encode(example, tokenizer)
        text = _text(example, tokenizer)
        plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids.tolist() == plain.input_ids
        answers = [m["content"] + "<|im_end|>" for m in example.messages if m["role"] == "assistant"]
        assert _spans(example, tokenizer) == answers
        characters = np.zeros(len(text) + 1, dtype=bool)
        at = 0
        for words in answers:
            at = text.index("<|im_start|>assistant\n" + words, at) + len("<|im_start|>assistant\n")
            characters[at : at + len(words)] = True
            at += len(words)
        reached = 0
        for (start, stop), flag in zip(plain.offset_mapping, learned, strict=True):
            whole = slice(min(start, reached), stop) if start == stop else slice(start, stop)  # trimmed: up to its end
            if whole.stop > whole.start:
                assert flag == characters[whole].any(), text[whole]
            reached = max(reached, stop)


@pytest.mark.parametrize("kind", ["bytes", "bytes, trimmed"])
def test_indentation_and_line_breaks_of_code_are_learned(kind):
    """`trim_offsets` gives a token of spaces no width: its place is inside the answer all the same."""
    tokenizer = make(kind)
    ids, learned = encode(_example(ANSWERS["code"]), tokenizer)
    assert tokenizer.decode(ids[learned]) == ANSWERS["code"] + "<|im_end|>"
    zero = [o for o in tokenizer(ANSWERS["code"], return_offsets_mapping=True).offset_mapping if o[0] == o[1]]
    assert bool(zero) == (kind == "bytes, trimmed")


def test_a_space_that_the_tokenizer_puts_before_an_answer_is_learned():
    template = (
        "{% for m in messages %}{{ bos_token if m.role == 'user' else eos_token }}{{ m.content }}{% endfor %}</s>"
    )
    tokenizer = tokenizers.make("pieces, always", template)
    ids, learned = encode(_example("8 euro"), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert next(t for t, flag in zip(tokens, learned, strict=True) if flag).startswith("▁")


# -- prompt and completion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tokenizers.KINDS)
@pytest.mark.parametrize(("prompt", "completion"), [
    ("the quick", " brown fox"), ("the quick ", "brown fox"), ("the qui", "ck brown"), ("x =\n", "    1\n"), ("<s>the", " fox"),
])  # fmt: skip
def test_prompt_and_completion_are_one_text(kind, prompt, completion):
    """One BOS, one EOS, no space between that nobody wrote: the tokens are those of the text as a whole."""
    tokenizer = make(kind)
    ids, learned = encode(Example(prompt=prompt, completion=completion), tokenizer)
    whole = tokenizer(prompt + completion).input_ids
    whole = whole[1:] if whole[:2] == [tokenizer.bos_token_id] * 2 else whole
    end = tokenizer.eos_token_id
    assert ids.tolist() == (whole if whole[-1] == end else [*whole, end])
    assert ids.tolist().count(end) == 1 and ids.tolist().count(tokenizer.bos_token_id) <= 1
    assert learned[-1] and not learned[0] and sorted(learned) == learned.tolist()
    held = tokenizer.decode(ids[learned][:-1])
    assert held.strip().endswith(completion.strip()) and len(held) <= len(completion) + 4
    assert encode(Example(prompt=prompt, completion=completion), tokenizer, "all")[1].all()


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_text_has_one_beginning_and_one_end(kind):
    tokenizer = make(kind)
    for text in ("the quick fox", "<s>the quick fox</s>", "the quick fox</s>"):
        ids, learned = encode(Example(completion=text), tokenizer)
        assert learned.all() and ids[-1] == tokenizer.eos_token_id
        assert ids.tolist().count(tokenizer.eos_token_id) == 1 and ids.tolist().count(tokenizer.bos_token_id) <= 1


# -- templates -------------------------------------------------------------------------------------------------------

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "a generation prompt that opens reasoning": (
        HEAD + "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ["<think>\nsix sevens\n</think>\n\n42"], ["\n\n42<|im_end|>"],
    ),
    "the same, and the answer opens it too": (
        HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ["<think>\nsix sevens\n</think>\n\n42"], ["six sevens\n</think>\n\n42<|im_end|>"],
    ),
    "an empty thought before the last answer": (
        HEAD + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}" + PROMPT,
        ["one", "two"], ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"],
    ),
    "stripped": (HEAD + "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + PROMPT, ["  one \n"], ["one<|im_end|>"]),
    "no generation prompt": (HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}", ["one", "two"], ["one<|im_end|>", "two<|im_end|>"]),
    "no header": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}"
        "{% endfor %}",
        ["one", "two"], [" one </s>", " two </s>"],
    ),
    "an end of the turn and one of the text": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
        ["one", "two"], ["one<|im_end|>", "two<|im_end|>"],
    ),
    "the same without a line break between": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
        ["one", "two"], ["one<|im_end|>", "two<|im_end|>"],
    ),
    "an end of two tokens": (
        HEAD + "{{ m.content }}</s><|im_end|>\n{% endfor %}" + PROMPT, ["one", "two"], ["one</s><|im_end|>", "two</s><|im_end|>"],
    ),
    "an end that is no special token": (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n[end]\n\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}",
        ["one </s> more", "two"], ["one </s> more\n[end]", "two\n[end]"],
    ),
    "a system prompt of its own": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        ["one", "two"], ["one<|im_end|>", "two<|im_end|>"],
    ),
    "an end that the answer brings along": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["one</s>", "two</s>"], ["one</s>", "two</s>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("first", ["user", "assistant"])
def test_the_span_is_what_the_template_writes(name, first):
    template, answers, expected = TEMPLATES[name]
    tokenizer = tokenizers.make("bytes", template)
    example = _example(*answers, first=first)
    if first == "assistant" and name == "no header":
        expected = [expected[0].lstrip(), *expected[1:]]  # nothing says that the model wrote the space
    assert _spans(example, tokenizer) == expected
    ids, learned = encode(example, tokenizer)
    assert len(ids) == len(tokenizer(_text(example, tokenizer), add_special_tokens=False).input_ids)
    assert tokenizer.decode(ids[learned]).endswith(expected[-1])
    assert _spans(example, tokenizer, "last") == expected[-1:]


REFUSED = {
    "it rewrites the past": ("{{ messages | length }}" + tokenizers.CHATML, "rewrites earlier turns", "two<|im_end|>"),
    "it drops a part of earlier answers": (
        HEAD + "{{ m.content if loop.last else m.content[1:] }}<|im_end|>\n{% endfor %}" + PROMPT,
        "drops or changes part of this answer", "two<|im_end|>",
    ),
    "it ends the last turn alone": (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ ' ' if not loop.last else '</s>' }}{% endfor %}",
        "ends this turn .message 2. only if no other turn follows", "two</s>",
    ),
    "another end where others follow": (
        HEAD + "{{ m.content }}{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}" + PROMPT,
        "ends this turn .message 2. only if no other turn follows", "two</s>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_the_last_answer_allows_names_the_way_out(name):
    template, said, last = REFUSED[name]
    tokenizer = tokenizers.make("bytes", template)
    example = _example("one", "two")
    with pytest.raises(DataError, match=said) as refusal:
        encode(example, tokenizer)
    assert "data.train_on=last" in str(refusal.value)
    assert _spans(example, tokenizer, "last") == [last]
    ids, learned = encode(example, tokenizer, "last")
    assert tokenizer.decode(ids[learned]) == last
    assert encode(example, tokenizer, "all")[1].all()


@pytest.mark.parametrize("template", [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}" + PROMPT,
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
])  # fmt: skip
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_template_that_never_ends_a_turn_is_refused(template, train_on):
    with pytest.raises(DataError, match=r"never learn to stop; data\.template=FILE"):
        encode(_example("one", "two"), tokenizers.make("bytes", template), train_on)


def test_a_template_that_leaves_out_the_answer_is_refused():
    template = "{% for m in messages %}{{ m.content if m.role == 'user' }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="does not write the content of the assistant's messages"):
        encode(_example("one"), tokenizers.make("bytes", template))


TRL = importlib.util.find_spec("trl")
REAL = sorted(Path(TRL.origin).parent.glob("chat_templates/*_training.jinja")) if TRL and TRL.origin else []
WITHOUT_TRL = [pytest.param(Path("none"), marks=pytest.mark.skip(reason="trl (make bench) is not installed"))]


@pytest.mark.parametrize("file", REAL or WITHOUT_TRL, ids=lambda file: file.stem)
def test_what_trl_marks_in_real_templates_holds_what_is_learned(file):
    """TRL's templates mark the assistant's part by hand (``{% generation %}``), here and there with its header."""
    template = file.read_text()
    marks = sorted(set(re.findall(r"<[|\uff5c][^<>'\"{} ]+>|<[a-z_]+[|]>|<\w+_of_\w+>", template)))
    tokenizer = tokenizers.make("bytes", template)
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    example = _example("quick brown\n\nfox", "é漢 dog", first="user")
    try:
        spans = _spans(example, tokenizer)
    except DataError as error:
        assert "vl" in file.stem or re.search("idefics|llava|smolvlm|gptoss", file.stem), error  # images; <|return|>
        return
    marked = tokenizer.apply_chat_template(example.messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, learned = encode(example, tokenizer)
    assert ids.tolist() == marked["input_ids"]
    assert all(theirs for theirs, ours in zip(marked["assistant_masks"], learned, strict=True) if ours)
    missed = [
        i for i, (theirs, ours) in enumerate(zip(marked["assistant_masks"], learned, strict=True)) if theirs > ours
    ]
    assert not re.search("quick|brown|fox|é|漢|dog", tokenizer.decode(ids[missed]))
    assert [span for span in spans if "quick brown\n\nfox" in span or "é漢 dog" in span] == spans


def test_a_call_of_a_tool_may_end_otherwise():
    """As Llama 3: an answer ends with one token, a call with another."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}</s>"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}" + PROMPT
    )
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"},
    ]  # fmt: skip
    spans = _spans(read_row({"messages": turns}, "auto"), tokenizers.make("bytes", template))
    assert spans == ['{"name": "f", "arguments": {"a": 1}}</s>', "three<|im_end|>"]
