"""Splitting, cutting, caching: counted, and the same every time."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.prepare import prepare_data


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def _prepare(file, tokenizer, cache, seed=0, **settings):
    return prepare_data(DataSettings(**{"train": str(file), "max_length": 512} | settings), seed, tokenizer, cache)


def test_equal_prompts_stay_on_one_side(tmp_path, tokenizer):
    rows = [{"instruction": f"q{n % 20}", "input": "", "output": f"answer {n}"} for n in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = _prepare(file, tokenizer, tmp_path / "cache", eval_fraction=0.2)
    assert (data.train_counts.kept, data.eval_counts.kept) == (48, 12)
    prompts = [{tokenizer.decode(ids).split("\n")[1] for ids in part["input_ids"]} for part in (data.train, data.eval)]
    assert not prompts[0] & prompts[1]
    again = _prepare(file, tokenizer, tmp_path / "cache", eval_fraction=0.2)
    assert again.key == data.key and again.train[5] == data.train[5]
    assert _prepare(file, tokenizer, tmp_path / "cache", seed=1, eval_fraction=0.2).key != data.key


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, tokenizer, suffix):
    from datasets import Dataset

    rows = [{"prompt": "a", "completion": f"b{n}"} for n in range(3)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(r) + "\n" for r in rows) if suffix == "jsonl" else json.dumps(rows))
    data = _prepare(file, tokenizer, tmp_path / "cache")
    assert [tokenizer.decode(r["input_ids"]) for r in data.train] == [f"ab{n}<|im_end|>" for n in range(3)]


@pytest.mark.parametrize(("truncation", "kept", "lengths"), [
    ("right", 1, [8]), ("left", 1, [8]), ("drop", 0, []), ("split", 4, [8, 8, 8]),
])  # fmt: skip
def test_truncation_is_done_and_counted(tmp_path, tokenizer, truncation, kept, lengths):
    file = tmp_path / "rows.jsonl"
    long = " ".join(f"{n:03d}" for n in range(10))
    file.write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "ab"}) + "\n")
    data = _prepare(file, tokenizer, tmp_path / "cache", max_length=8, truncation=truncation)
    found = [len(r["input_ids"]) for r in data.train][:-1]
    assert all(length <= 8 for length in found)
    assert data.train_counts.rows == 2
    if truncation == "drop":
        assert data.train_counts.dropped_long == 1 and not found
    else:
        assert data.train_counts.truncated == 1
        ids = [i for r in list(data.train)[:-1] for i in r["input_ids"]]
        whole = [*tokenizer(long).input_ids, tokenizer.eos_token_id]
        expected = {"right": whole[:8], "left": whole[-8:], "split": whole}[truncation]
        assert ids == expected
