"""The first 100 rows of each real data set: what is learned is exactly the assistant's text and its end-of-turn token."""

from __future__ import annotations

from itertools import islice

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.data.chat import Example, find_format, read_row
from fsdp_qlora.data.encode import encode
from fsdp_qlora.data.sources import read_source

SETS = {
    "alpaca_en_demo.jsonl": "alpaca",
    "identity.jsonl": "alpaca",
    "dpo_en_demo.json": "preference",
    "kto_en_demo.json": "messages",
    "glaive_toolcall_en_demo.json": "conversations",
    "c4_demo.jsonl": "text",
    "wiki_demo.txt": "text",
}


@pytest.fixture(scope="module")
def tokenizer(real_model):
    return AutoTokenizer.from_pretrained(real_model)


def _examples(file, row_format: str) -> list[Example]:
    rows = list(islice(read_source(str(file)), 100))
    assert rows and all(find_format(row.values or {}) == row_format for row in rows)
    return [read_row(row.values or {}, "auto") for row in rows]


@pytest.mark.parametrize("name", SETS)
def test_masks_of_real_rows(real_data, tokenizer, name):
    for example in _examples(real_data / name, SETS[name]):
        ids, learned = encode(example, tokenizer)
        found = tokenizer.decode(ids[learned])
        if example.messages:
            answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
            assert found == "".join(f"{answer}<|im_end|>" for answer in answers)
        else:
            assert found == f"{example.completion}<|im_end|>" and learned.all()


@pytest.mark.full
def test_trl_masks_the_same_completions(real_data, tokenizer):
    """TRL's completion_only_loss on the same conversations, where a row is a prompt and one answer."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    examples = [e for e in _examples(real_data / "alpaca_en_demo.jsonl", "alpaca") if len(e.messages) == 2]
    rows = Dataset.from_list([{"prompt": e.messages[:1], "completion": e.messages[1:]} for e in examples])
    theirs = _trl_rows(trl, rows, tokenizer)
    assert len(theirs) == len(examples)
    for example, row in zip(examples, theirs, strict=True):
        ids, learned = encode(example, tokenizer)
        assert ids.tolist() == row["input_ids"]
        last = len(ids) - 1  # TRL also learns the line break that the template writes after the end-of-turn token
        assert [label != -100 for label in row["labels"]][:last] == learned.tolist()[:last]


def _trl_rows(trl, rows, tokenizer):
    """Return rows as TRL's SFTTrainer tokenizes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    settings = trl.SFTConfig(output_dir="unused", report_to=[], use_cpu=True, max_length=None, bf16=False)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(tiny), args=settings, train_dataset=rows, processing_class=tokenizer
    )
    return list(trainer.train_dataset)
