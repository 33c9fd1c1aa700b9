"""Whatever decides the tokens decides the key they are cached under; what decides nothing does not."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.identity import code_digest, tokenizer_digest
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.errors import DataError


def _edited(folder, target, changes, name="tokenizer.json"):
    """Return the tokenizer of ``folder`` with parts of one of its files replaced."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    file = target / name
    values = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = values
        for key in parents:
            inner = inner[key]
        inner[last] = value
    file.write_text(json.dumps(values))
    return AutoTokenizer.from_pretrained(target)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CHANGES = {
    "normalizer": {"normalizer": {"type": "Lowercase"}},
    "normalizer, a sequence": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}},
    "pre-tokenizer": {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
    "pre-tokenizer, its pattern": {"pre_tokenizer": BYTES | {"use_regex": False}},
    "post-processor": {"post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }},
    "merges": {"model.merges": []},
    "dropout of merges": {"model.dropout": 0.1},
    "unknown token": {"model.unk_token": "<|endoftext|>"},
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "The QUICK", "completion": " fox ﬁ"}) + "\n")
    return file


def _key(rows, tokenizer, cache, **settings):
    return prepare_data(DataSettings(**{"train": str(rows), "max_length": 64} | settings), 0, tokenizer, cache).key


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_of_tokenizer_json_is_in_the_key(tmp_path, tiny_model, rows, change):
    plain = AutoTokenizer.from_pretrained(tiny_model)
    other = _edited(tiny_model, tmp_path / "other", CHANGES[change])
    assert other.get_vocab() == plain.get_vocab() and other.chat_template == plain.chat_template
    assert _key(rows, other, tmp_path / "cache") != _key(rows, plain, tmp_path / "cache")


@pytest.mark.parametrize("change", [
    {"eos_token": "<|endoftext|>"}, {"bos_token": "<|endoftext|>"}, {"split_special_tokens": True},
])  # fmt: skip
def test_the_config_of_a_tokenizer_is_in_the_key(tmp_path, tiny_model, rows, change):
    other = _edited(tiny_model, tmp_path / "other", change, "tokenizer_config.json")
    plain = AutoTokenizer.from_pretrained(tiny_model)
    assert _key(rows, other, tmp_path / "cache") != _key(rows, plain, tmp_path / "cache")


def test_the_template_is_in_the_key(tmp_path, tiny_model, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    keys = {_key(rows, tokenizer, tmp_path / "cache")}
    for template in (f"{tokenizer.chat_template} ", {"default": tokenizer.chat_template, "tool_use": "x"}):
        tokenizer.chat_template = template
        keys.add(_key(rows, tokenizer, tmp_path / "cache"))
    assert len(keys) == 3


def test_old_tokens_are_not_used_for_another_tokenizer(tmp_path, tiny_model, rows):
    def tokens(tokenizer):
        data = prepare_data(DataSettings(train=str(rows), max_length=64), 0, tokenizer, tmp_path / "cache")
        assert data.train is not None
        return data.train[0]["input_ids"]

    other = _edited(tiny_model, tmp_path / "other", CHANGES["normalizer"])
    assert tokens(AutoTokenizer.from_pretrained(tiny_model)) != tokens(other)


def test_what_decides_no_token_is_not_in_the_key(tmp_path, tiny_model, rows):
    plain = AutoTokenizer.from_pretrained(tiny_model)
    key = _key(rows, plain, tmp_path / "cache")
    moved = _edited(tiny_model, tmp_path / "moved", {"model_max_length": 17}, "tokenizer_config.json")
    moved(["a", "b c d"], padding=True, truncation=True, max_length=2)  # a call leaves its settings behind
    assert _key(rows, moved, tmp_path / "cache") == key
    shutil.copy(rows, tmp_path / "elsewhere.jsonl")
    assert _key(tmp_path / "elsewhere.jsonl", plain, tmp_path / "cache") == key


def test_the_same_bytes_as_another_kind_of_file_are_other_rows(tmp_path, tiny_model, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shutil.copy(rows, tmp_path / "rows.txt")
    assert _key(tmp_path / "rows.txt", tokenizer, tmp_path / "cache") != _key(rows, tokenizer, tmp_path / "cache")


@pytest.fixture
def own_modules(tmp_path):
    """Write modules of a user's own, importable until the test ends; return how to write them anew."""
    folder = tmp_path / "own"
    folder.mkdir()
    sys.path.insert(0, str(folder))
    before = set(sys.modules)

    def write(**sources):
        for name in set(sys.modules) - before:
            if name.startswith("own_"):
                del sys.modules[name]
        importlib.invalidate_caches()
        for name, source in sources.items():
            file = folder / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)

    yield write
    write()
    sys.path.remove(str(folder))


MAIN = "import json\nfrom own_parts import PREFIX\n\ndef convert(row):\n    return {'text': PREFIX + row['prompt']}\n"


def test_code_that_rows_go_through_is_in_the_key(tmp_path, tiny_model, rows, own_modules):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def key(**sources):
        own_modules(**sources)
        return _key(rows, tokenizer, tmp_path / "cache", row_function="own_main:convert", allow_code=True)

    first = key(own_main=MAIN, own_parts="PREFIX = 'a'\n")
    assert key(own_main=MAIN, own_parts="PREFIX = 'a'\n") == first
    others = [
        key(own_main=MAIN, own_parts="PREFIX = 'b'\n"),  # a module that it imports
        key(own_main=MAIN.replace("PREFIX + ", ""), own_parts="PREFIX = 'a'\n"),
    ]
    assert len({first, *others}) == 3


MAKERS = {
    "a part of another function": "from functools import partial\nconvert = partial(own, prefix={prefix!r})\n",
    "an object": "class Own:\n    def __call__(self, row): return own(row, {prefix!r})\nconvert = Own()\n",
    "an installed function": "import json\nPREFIX = {prefix!r}\nconvert = dict\n",
    "wrapped": "from functools import lru_cache, wraps\n@wraps(dict)\ndef convert(row): return own(row, {prefix!r})\n",
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_changed_function_is_noticed_whatever_makes_it(tmp_path, tiny_model, rows, own_modules, kind):
    """R5: the module that the settings name is looked at, not only the one that the function says it is from."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def key(prefix):
        own = "def own(row, prefix): return {'text': prefix + row['prompt']}\n"
        own_modules(own_main=own + MAKERS[kind].format(prefix=prefix))
        return _key(rows, tokenizer, tmp_path / "cache", row_function="own_main:convert", allow_code=True)

    assert key("a") == key("a") != key("b")


def test_code_of_packages_is_followed_and_installed_code_is_not(own_modules):
    package = {
        "own_package__all": "",
        "own_package__rows": "def f(row):\n    from . import deep\n    return deep.g(row)\n",
    }

    def digest(deep):
        own_modules(**package, own_package__deep=deep)
        from own_package.rows import f

        return code_digest(f)

    assert digest("def g(row): return row\n") != digest("import torch.nn\ndef g(row): return {}\n")
    assert code_digest(json.loads) == code_digest(shutil.copy) == code_digest(None)


def test_a_row_function_that_cannot_be_imported_says_why(tmp_path, tiny_model, rows, own_modules):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for source, said in (("def convert(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError"), ("", "AttributeError")):
        own_modules(own_main=source)
        with pytest.raises(DataError, match=f"data.row_function: .*{said}"):
            _key(rows, tokenizer, tmp_path / "cache", row_function="own_main:convert", allow_code=True)


def test_the_digest_is_the_same_in_every_process(tiny_model):
    one, other = (AutoTokenizer.from_pretrained(tiny_model) for _ in range(2))
    assert tokenizer_digest(one) == tokenizer_digest(other)
