"""What ``data.eval_fraction=auto`` holds out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.data.prepare import PreparedData, held_out_choice, prepare_data
from fsdp_qlora.run.samples import held_out_prompts
from tests import own_rows


def _prepared(
    rows: list[dict[str, object]], tokenizer: AutoTokenizer, folder: Path, **settings: object
) -> PreparedData:
    file = own_rows.write(folder / f"{len(list(folder.iterdir()))}.jsonl", rows)
    data = DataSettings(train=str(file), **settings)  # type: ignore[arg-type]
    return prepare_data(data, 0, tokenizer, folder / "cache")  # type: ignore[arg-type]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def _pairs(count: int) -> list[dict[str, object]]:
    words = [
        "amber",
        "birch",
        "cedar",
        "dune",
        "ember",
        "frost",
        "grove",
        "heath",
        "inlet",
        "jade",
        "kelp",
        "loam",
        "moss",
        "north",
        "ochre",
        "pine",
        "quartz",
        "reed",
    ]
    return [
        {"prompt": f"{words[n % 18]} {n * 7919 % 10007} {words[n // 18 % 18]}?", "completion": f" {n * 104729 % 99991}"}
        for n in range(count)
    ]


def test_a_small_part_is_held_out_without_near_copies(tokenizer, tmp_path):
    for total, held_out in ((19, 0), (20, 4), (100, 5), (300, 15)):
        data = _prepared(_pairs(total), tokenizer, tmp_path)
        assert (data.train_counts.kept, data.eval_counts.kept) == (total - held_out, held_out)
        choice = held_out_choice(DataSettings(), data)["data.eval_fraction"]
        assert (f"{held_out} of {total} rows" if held_out else "fewer than 20") in choice.why
    assert _prepared(_pairs(100), tokenizer, tmp_path, eval_fraction=0.0).eval is None
    # most rows twice, but for a space and a full stop: only those that stand alone may be held out
    rows = _pairs(60)
    again = [{**row, "prompt": f"{row['prompt']} ", "completion": f"{row['completion']}."} for row in rows[:50]]
    data = _prepared([*rows, *again], tokenizer, tmp_path)
    assert data.eval is not None and len(data.eval) == 6
    alone = [f"{row['prompt']}{row['completion']}" for row in rows[50:]]
    assert all(tokenizer.decode(ids, skip_special_tokens=True) in alone for ids in data.eval["input_ids"])


@pytest.mark.full
def test_rows_of_one_prompt_hold_out_nothing(tokenizer, tmp_path):
    rows = [{"prompt": "draw a number", "completion": f" {n}"} for n in range(40)]
    data = _prepared(rows, tokenizer, tmp_path)  # type: ignore[arg-type]
    assert data.eval is None and "stand alone" in data.held_out_why


@pytest.mark.full
def test_prompts_of_held_out_rows_can_be_typed(tokenizer, tmp_path):
    data = _prepared(own_rows.rows(), tokenizer, tmp_path)
    assert data.eval is not None and len(data.eval) == 5
    samples = held_out_prompts(TokenRows(data.eval), tokenizer, 3)
    known = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in own_rows.rows()}  # type: ignore[index]
    assert len(samples) == 3 and all(known[sample.text] == sample.wanted for sample in samples)
    told = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in own_rows.rows()]  # type: ignore[misc]
    with_system = _prepared(told, tokenizer, tmp_path)  # type: ignore[arg-type]
    assert with_system.eval is not None and held_out_prompts(TokenRows(with_system.eval), tokenizer, 3) == []
    assert json.dumps([sample.wanted for sample in samples]).isascii()
