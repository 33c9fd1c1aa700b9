"""`evaluate`: loss and perplexity of every source, and of all rows, are what ten lines of plain transformers compute."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.measure import measure
from tests.build import config_of, world_of
from tests.tiny import write_chat_rows


def write_sources(folder: Path) -> list[Path]:
    """Write two files of rows that differ in number and length."""
    rows = write_chat_rows(folder / "all.jsonl", 17).read_text().splitlines(keepends=True)
    files = [folder / "short.jsonl", folder / "long.jsonl"]
    files[0].write_text("".join(rows[:5]))
    files[1].write_text("".join(rows[5:]))
    return files


def measured(ranks: Ranks, folder: str, groups: dict[str, Any]) -> dict[str, Any] | str:
    """Measure as the command does; return what evaluate.json holds, or the error."""
    config = config_of(
        folder, precision={"name": "fp32"}, quant={"name": "none", "double_quant": False}, model={"check": "off"},
        **groups,
    )  # fmt: skip
    try:
        return measure(config, load_for_inference(config, None, world_of(ranks))).values()
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"


def plain(folder: Path, files: list[Path]) -> dict[str, dict[str, float]]:
    """Return loss and tokens of each file: the assistant's text and its end-of-turn token are scored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    results, total, count = {}, 0.0, 0
    for file in files:
        losses = []
        for row in map(json.loads, file.read_text().splitlines()):
            prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
            text = f"{prompt}{row['messages'][1]['content']}<|im_end|>"
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, start - 1 : -1]
            losses += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="none").tolist()
        results[str(file)] = {"eval_loss": sum(losses) / len(losses), "target_tokens": len(losses)}
        total, count = total + sum(losses), count + len(losses)
    results["all"] = {"eval_loss": total / count, "target_tokens": count}
    return {name: {**r, "eval_perplexity": math.exp(r["eval_loss"])} for name, r in results.items()}


@pytest.mark.full
def test_each_source_is_as_in_plain_transformers_on_any_number_of_ranks(pool, tmp_path, tiny_model):
    files = write_sources(tmp_path)
    names = [str(file) for file in files]
    data = {"eval": names, "train": names, "max_length": 128}
    wanted = plain(tiny_model, files)
    for num_ranks in (1, 2, 3):
        groups = {"data": data, "train": {"eval_batch_size": 2}}
        for values in pool.run(num_ranks, measured, str(tiny_model), groups):
            by_source = values.pop("sources")
            assert set(by_source) == {str(file) for file in files}
            for name, numbers in {"all": values, **by_source}.items():
                assert numbers == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.full
def test_answers_are_measured_beside_and_what_is_missing_is_said(pool, tmp_path, tiny_model):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the quick", "id": 1}\n{"messages": [{"role": "user", "content": "a lazy dog"}]}\n')
    asked = {
        "evaluate": {"prompts": str(prompts)},
        "generate": {"max_new_tokens": 9, "batch_size": 1, "temperature": 2.0},
    }
    one, all_ranks = (pool.run(n, measured, str(tiny_model), asked) for n in (1, 4))  # answers wait for the whole world
    assert one[0] == all_ranks[0] and [line.get("id") for line in one[0]["answers"]] == [1, None]
    assert len({line["answer"] for line in one[0]["answers"]}) == 2 and "eval_loss" not in one[0]
    prompts.write_text('{"prompt": "x", "adapter": "poet"}\n')
    said = pool.run(1, measured, str(tiny_model), asked)[0]
    assert said.startswith("2 evaluate.prompts: ") and "line 1:" in said and "adapter={name: FOLDER" in said
