"""Whatever a row does, reading, decoding, rendering or tokenizing it: it is a bad row, named or passed over."""

from __future__ import annotations

import gzip
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.encode import encode_batch
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.data.sources import read_source
from fsdp_qlora.errors import DataError

GOOD = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "fox"}]})


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def _require_bad_row(file, tokenizer, tmp_path, where, said, kept=2, **settings):
    settings = {"train": str(file), "max_length": 512} | settings
    with pytest.raises(DataError) as refusal:
        prepare_data(DataSettings(**settings), 0, tokenizer, tmp_path / "cache")
    assert f"{file}, {where}: " in str(refusal.value) and said in str(refusal.value)
    data = prepare_data(DataSettings(**settings, on_bad_row="skip"), 0, tokenizer, tmp_path / "cache")
    assert data.train_counts.kept == kept and data.bad_rows is not None
    (bad,) = map(json.loads, data.bad_rows.read_text(encoding="utf-8").splitlines())
    assert bad["where"].endswith(where) and said in bad["problem"]


def _assistant(**message):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **message}]}


HALF = "cut here \ud83d"
BAD = {
    "half a character": (_assistant(content=HALF), "half a character"),
    "half a character in a question": ({"messages": [{"role": "user", "content": HALF}, *_assistant()["messages"]]}, "half"),
    "half a character in a part": (_assistant(content=[{"type": "text", "text": HALF}]), "half a character"),
    "half a character, Alpaca": ({"instruction": "q", "output": HALF}, "half a character"),
    "half a character in a prompt": ({"prompt": HALF, "completion": "a"}, "half a character"),
    "half a character in a text": ({"text": HALF}, "half a character"),
    "half a character in a tool": ({**_assistant(), "tools": [{"function": {"name": HALF}}]}, "half a character"),
    "half a character in arguments": (_assistant(tool_calls=[{"function": {"name": "f", "arguments": {"a": HALF}}}]), "half"),
    "half a character in a role": ({"messages": [{"role": HALF, "content": "x"}]}, "unknown role"),
    "a message that is none": ({"messages": ["hello"]}, "expected a message"),
    "a role that is no text": ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    "a ShareGPT role that is no text": ({"conversations": [{"from": {"a": 1}, "value": "x"}]}, "unknown role"),
    "nested JSON": ({**_assistant(), "tools": "[" * 100_000}, "'tools' is not valid JSON"),
    "no history": ({"instruction": "q", "output": "a", "history": [["one"]]}, "does not match data.format"),
    "a template that stops": ({"messages": [{"role": "user", "content": "stop"}, *_assistant()["messages"]]}, "rejects the"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_or_passed_over(tmp_path, tokenizer, kind):
    row, said = BAD[kind]
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD + "\n" + json.dumps(row) + "\n" + GOOD + "\n")
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.content == 'stop' %}{{ 1 / 0 }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _require_bad_row(file, tokenizer, tmp_path, "line 2", said)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz"])
def test_a_csv_row_in_another_encoding(tmp_path, tokenizer, name):
    comma = b"\t" if "tsv" in name else b","
    lines = [b"prompt,completion", b"ok,fine", b"caf\xe9,ol\xe9", b"end,fine"]
    data = b"\n".join(line.replace(b",", comma) for line in lines) + b"\n"
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    _require_bad_row(file, tokenizer, tmp_path, "line 3", "the byte 0xE9 is not valid UTF-8")


def test_bytes_in_a_csv_column_that_nobody_asks_for_change_nothing(tmp_path, tokenizer):
    file = tmp_path / "rows.csv"
    file.write_bytes(b"prompt,completion,city\nok,fine,M\xfcnchen\n")
    data = prepare_data(DataSettings(train=str(file), max_length=64), 0, tokenizer, tmp_path / "cache")
    assert data.train_counts.kept == 1 and data.bad_rows is None


def test_long_cells_and_odd_quotes_of_csv(tmp_path, tokenizer):
    file = tmp_path / "rows.csv"
    file.write_text(f'prompt,completion\na,{"fox " * 100_000}\n"c","d ""e"""\nx,y\n')
    assert [len((row.values or {})["completion"]) for row in read_source(str(file))] == [400_000, 5, 1]
    file.write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(DataError, match="line 1: the column 'prompt' appears twice"):
        list(read_source(str(file)))
    file.write_text("prompt,completion\na,b\nc,d\re,f\ng,h\n")  # a bare carriage return ends a row
    assert len(list(read_source(str(file)))) == 4


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest(tmp_path, tokenizer):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\na,"b\nb"\nx,5" wide\nc,"d\ne,f\ng,h\n')
    _require_bad_row(file, tokenizer, tmp_path, "line 5", "a quote opened here is never closed")


def test_rows_of_a_json_array_are_judged_one_by_one(tmp_path, tokenizer):
    file = tmp_path / "rows.json"
    for bad, said in (
        ('{"text": "a", "text": "b"}', "the key 'text' appears twice"), ("[1, 2]", "expected an object"),
        (r'{"text": "\ud83d"}', "half a character"), ("3", "expected an object"),
    ):  # fmt: skip
        file.write_text(f"\n[ {GOOD},\n{bad} ,{GOOD}\n ]\n")
        _require_bad_row(file, tokenizer, tmp_path, "row 2", said)
    file.write_bytes(f"[{GOOD}, ".encode() + b'{"text": "caf\xe9"}' + f", {GOOD}]".encode())
    _require_bad_row(file, tokenizer, tmp_path, "row 2", "the byte 0xE9 is not valid UTF-8")


@pytest.mark.parametrize("text", ["[{}, {", "[{} {}]", "[{}", '[{"a": }]', "[" * 100_000, "[,]"])
def test_a_broken_json_array_names_the_row_it_breaks_at(tmp_path, text):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json, row \d is not valid JSON"):
        list(read_source(str(file)))
    file.write_text("[ ]")
    with pytest.raises(DataError, match="is empty"):
        list(read_source(str(file)))


@pytest.mark.parametrize(
    "name", ["rows.jsonl.gz", "rows.jsonl.xz", "rows.jsonl.bz2", "rows.jsonl.zst", "rows.parquet", "rows.arrow"]
)
@pytest.mark.parametrize(
    "start", [b"", b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"PAR1", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"]
)
def test_a_damaged_file_is_one_message(tmp_path, name, start):
    (tmp_path / name).write_bytes(start + b"this is no such file" * 20)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_source(str(tmp_path / name)))


def test_a_text_that_the_tokenizer_cannot_take_does_not_fail_its_neighbours():
    """A vocabulary of words without one for unknown words: the tokenizer raises for the whole batch."""
    core = Tokenizer(models.WordLevel({"fox": 0, "dog": 1, "</s>": 2}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    examples = [Example(completion=text) for text in ("fox dog", "fox cat", "dog")]
    one, bad, other = encode_batch(examples, tokenizer)
    assert isinstance(bad, DataError) and "the tokenizer rejects the text" in str(bad)
    assert not isinstance(one, DataError) and one[0].tolist() == [0, 1, 2]
    assert not isinstance(other, DataError) and other[0].tolist() == [1, 2]


def test_what_a_row_function_returns_is_judged_like_a_row(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": q}) + "\n" for q in ("fine", "nothing", "fine")))
    own = {"row_function": "tests.unit.test_bad_rows:odd", "allow_code": True}
    _require_bad_row(file, tokenizer, tmp_path, "line 2", "expected a row {...}, got NoneType", **own)


def odd(row):
    """Somebody's function that forgets to return in one case."""
    return {"text": "a"} if row["q"] == "fine" else None


DIGITS = "9" * 5000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json"])
@pytest.mark.parametrize("where", ["as a value", "deep inside", "in a key that nobody reads", "negative"])
def test_an_integer_without_end_is_a_bad_row(tmp_path, tokenizer, name, where):
    """R6: Python refuses to read more than 4300 digits, with an error that no JSON decoder expects."""
    inside = {
        "as a value": f'{{"text": {DIGITS}}}', "deep inside": f'{{"text": "a", "more": [{{"n": [1, {DIGITS}]}}]}}',
        "in a key that nobody reads": f'{{"id": {DIGITS}, "text": "a"}}', "negative": f'{{"text": "a", "n": -{DIGITS}}}',
    }[where]  # fmt: skip
    file = tmp_path / name
    lines = [GOOD, inside, GOOD]
    file.write_text(f"[{', '.join(lines)}]" if name == "rows.json" else "\n".join(lines))
    place = "row 2" if name == "rows.json" else "line 2"
    _require_bad_row(file, tokenizer, tmp_path, place, f"holds an integer of {5000 + (where == 'negative')} digits")


@pytest.mark.parametrize("tools", [f'[{{"function": {{"n": {DIGITS}}}}}]', f"[{DIGITS}]"])
def test_an_integer_without_end_in_json_within_json(tmp_path, tokenizer, tools):
    """R6: nor where the numbers lie in text that is JSON."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([GOOD, json.dumps({**_assistant(), "tools": tools}), GOOD]))
    _require_bad_row(file, tokenizer, tmp_path, "line 2", "'tools' is not valid JSON")


class _Panic(BaseException):
    """As pyo3 raises it: no ``except Exception`` catches it."""


class _Fails:
    """A tokenizer that raises at one text."""

    def __init__(self, tokenizer, error):
        self._tokenizer, self._error = tokenizer, error

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **settings):
        if any("boom" in text for text in texts):
            raise self._error
        return self._tokenizer(texts, **settings)


def test_a_panic_of_the_tokenizer_is_a_bad_row(tokenizer):
    """R6: its panic is no Exception, and a bad row all the same."""
    examples = [Example(completion=text) for text in ("a", "boom", "b")]
    one, bad, other = encode_batch(examples, _Fails(tokenizer, _Panic("index out of bounds")))
    assert isinstance(bad, DataError) and "the tokenizer rejects the text: _Panic: index out of bounds" in str(bad)
    assert not isinstance(one, DataError) and not isinstance(other, DataError)


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_ends_the_process_is_no_bad_row(tokenizer, signal):
    """R6: who presses Ctrl-C wants to stop."""
    with pytest.raises(signal):
        encode_batch([Example(completion="boom")], _Fails(tokenizer, signal()))
