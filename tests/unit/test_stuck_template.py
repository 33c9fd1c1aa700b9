"""S11: a chat template is somebody else's program. It ends, or is ended, and takes no more memory than it may."""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data import encode as encoding
from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.encode import StuckTemplateError, encode, encode_batch
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.distributed.sandbox import Apart, StuckError
from fsdp_qlora.errors import DataError, ModelError
from fsdp_qlora.inference.rendering import render_apart
from tests.tiers import some_in_full
from tests.tokenizers import CHATML

CHAT = Example(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "fox"}])
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
STUCK = {
    "nested loops": LOOP,
    "loops without range": "{% for a in 'xxxxxxxxxxxxxxxx' %}" * 12 + "{% endfor %}" * 12,
    "a power": "{{ (3 ** (10 ** 9)) % 7 }}",
    "a filter": "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 4) | length }}" * 2000,
}
REFUSED = {
    "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long text that is not written": "{% if 'a' * 10 ** 10 == 'b' %}{% endif %}",
    "a long list": "{{ ([0] * 10 ** 10) | length }}",
    "a wide format": "{{ '%09999999999d' % 1 }}",
    "a wide line": "{{ 'a'.ljust(10 ** 10) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a loop that doubles": "{% set n = namespace(s='a') %}{% for a in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "more than a row may have": "{{ 'a' * (64 * 2 ** 20 + 1) }}",
}


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def frugal():
    """Give a row a gigabyte instead of four."""
    before, encoding.Apart = encoding.Apart, lambda work: Apart(work, more_bytes=2**30)
    yield
    encoding.Apart = before


@pytest.fixture
def impatient():
    """Give a row a second instead of two minutes."""
    before, encoding.Apart = encoding.Apart, lambda work: Apart(work, seconds=1)
    yield
    encoding.Apart = before


@pytest.mark.parametrize("kind", some_in_full(STUCK, ("nested loops", "a power")))
def test_a_template_that_does_not_end_is_ended(tokenizer, impatient, kind):
    """S11: the message names it, and no later row is tried."""
    tokenizer.chat_template = STUCK[kind] + CHATML
    started = time.monotonic()
    with pytest.raises(
        StuckTemplateError, match=r"the chat template that begins with .* took longer than 1 s"
    ) as refused:
        encode_batch([Example(completion="a"), CHAT, CHAT], tokenizer)
    assert STUCK[kind][:20] in str(refused.value) and refused.value.number == 1
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("kind", some_in_full(REFUSED, ("a long range", "a long text", "a macro that calls itself")))
def test_a_template_that_takes_too_much_makes_a_bad_row(tokenizer, frugal, kind):
    """S11: rather than taking the memory of this process."""
    tokenizer.chat_template = REFUSED[kind] + CHATML
    with pytest.raises(
        DataError, match=r"the chat template (rejects the conversation|renders the conversation to 67108.* characters)"
    ):
        encode(CHAT, tokenizer)
    tokenizer.chat_template = CHATML
    assert tokenizer.decode(encode(CHAT, tokenizer)[0]).endswith("fox<|im_end|>\n")


def test_a_run_ends_at_the_first_row_also_where_bad_ones_are_passed_over(tmp_path, tokenizer, impatient):
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    file.write_text("\n".join([json.dumps({"text": "a"})] + [json.dumps({"messages": chat})] * 50))
    tokenizer.chat_template = LOOP + CHATML
    settings = DataSettings(train=str(file), max_length=64, on_bad_row="skip")
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2: the chat template .*; data\.template=FILE sets"
    ) as refused:
        prepare_data(settings, 0, tokenizer, tmp_path / "cache")
    assert refused.value.exit_code == 2 and time.monotonic() - started < 20
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_rows_that_only_another_process_can_inherit(tokenizer):
    """Dates and other objects cannot be sent."""
    tokenizer.chat_template = "{% if messages[0].date is defined %}" + CHATML + "{% endif %}"
    dated = Example(messages=[{"role": "user", "content": "q", "date": datetime.date(2026, 1, 2)}, CHAT.messages[1]])
    for _ in range(2):
        assert tokenizer.decode(encode(dated, tokenizer)[0]).endswith("fox<|im_end|>\n")


def test_the_process_stays_and_is_replaced_when_the_template_changes(tokenizer):
    tokenizer.chat_template = CHATML
    encode(CHAT, tokenizer)
    first = _child()
    encode(CHAT, tokenizer)
    assert _child() == first
    tokenizer.chat_template = CHATML.replace("im_end", "endoftext")
    assert "<|im_end|>" not in tokenizer.decode(encode(CHAT, tokenizer)[0])
    assert _child() != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    os.kill(_child(), signal.SIGKILL)
    time.sleep(0.2)
    assert tokenizer.decode(encode(CHAT, tokenizer)[0]).endswith("fox<|endoftext|>\n")


def _child():
    assert encoding._last is not None and encoding._last[1]._child is not None
    return encoding._last[1]._child[0]


def test_a_thread_that_ends_takes_its_process_along_and_the_next_gets_another(tokenizer):
    tokenizer.chat_template = CHATML + " "
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda _: encode(CHAT, tokenizer)[0].tolist(), range(8)))
        assert all(row == rows[0] for row in rows)


@pytest.mark.parametrize(("work", "said"), [
    (lambda item: os._exit(3), "terminated the process"), (lambda item: os.kill(os.getpid(), 9), "terminated the process"),
    (lambda item: time.sleep(60) or b"", "took longer than 1 s"),
])  # fmt: skip
def test_a_process_that_dies_names_the_item(work, said):
    jobs = Apart(lambda item: b"fine" if item < 2 else work(item), seconds=1)
    for _ in range(2):
        with pytest.raises(StuckError, match=said) as stuck:
            jobs.results([0, 1, 2, 3])
        assert stuck.value.number == 2
    assert jobs.results([0, 1]) == [b"fine", b"fine"]
    jobs.close()


def test_a_bug_keeps_its_traceback_and_nothing_of_ours_is_inherited(tmp_path):
    jobs = Apart(lambda item: {}[item], seconds=5)
    with pytest.raises(RuntimeError, match="KeyError: 'gone'"):
        jobs.results(["gone"])
    with (tmp_path / "lock").open("w") as held:
        number = held.fileno()
        jobs = Apart(lambda item: str(Path(f"/proc/self/fd/{number}").exists()).encode())
        assert jobs.results([1]) == [b"False"]
    jobs.close()
    assert threading.active_count() < 50


@pytest.mark.parametrize(("template", "said"), [
    ("{{ 'a' * 10 ** 10 }}", "rejects the prompt: MemoryError"), ("{{ raise_exception('no') }}", "rejects the prompt: .*no"),
])  # fmt: skip
def test_a_prompt_to_answer_is_rendered_apart_too(tokenizer, template, said):
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=f"chat template {said}"):
        render_apart(tokenizer, [{"role": "user", "content": "q"}])
    tokenizer.chat_template = CHATML
    text = render_apart(tokenizer, [{"role": "user", "content": "é \ud83d"}], add_generation_prompt=True)
    assert text.endswith("é \ud83d<|im_end|>\n<|im_start|>assistant\n")
