"""`export.compare=true`: the trained model beside both forms of a merge, as stock upstream computes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.distributed.test_merged import lora, write_adapter
from tests.tiny import make_model

pytestmark = [pytest.mark.launch, pytest.mark.full]
LINE = re.compile(r"^(trained model|original|dequantized): loss ([\d.]+) on 8 held-out rows(?:, .* ([\d.]+))?$", re.M)


@torch.no_grad()
def logits(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model.eval()(input_ids=ids[None]).logits[0].float() for ids in rows]


def test_losses_and_differences_are_those_of_stock_upstream(cli, tmp_path, chat_rows):
    base = make_model(tmp_path / "base", intermediate_size=384)
    folder = write_adapter(base, tmp_path / "adapter", lora())
    held = tmp_path / "held.jsonl"
    held.write_text("".join(chat_rows.read_text().splitlines(keepends=True)[:8]))
    words = ["what=merged", f"adapter={folder}", f"data.eval={held}", "data.max_length=64", "launcher.device=cpu"]
    forms = {}
    for form in ("original", "dequantized"):
        done = cli("export", *words, f"export.merge_base={form}", f"export.to={form}", "export.compare=true")
        assert done.returncode == 0, done.stderr
        assert f"folded into the {form} base (as asked)" in done.stdout
        printed = {name: (float(loss), float(off) if off else None) for name, loss, off in LINE.findall(done.stdout)}
        assert printed.keys() == {"trained model", "original", "dequantized"}
        forms[form] = logits(_plain(tmp_path / form), tokens := _tokens(base, held))
    stock = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=stock, dtype=torch.bfloat16, device_map="cpu"
    )
    trained = logits(PeftModel.from_pretrained(quantized, str(folder)), tokens)
    learned = _learned(base, tokens)
    for name, ours in {"trained model": trained, **forms}.items():
        losses = [
            cross_entropy(x[:-1], ids[1:], reduction="none")[mask[1:]]
            for x, ids, mask in zip(ours, tokens, learned, strict=True)
        ]
        assert printed[name][0] == pytest.approx(float(torch.cat(losses).mean()), rel=2e-3)
    for name, ours in forms.items():
        off = max(float((x - y).abs().max()) for x, y in zip(ours, trained, strict=True))
        assert printed[name][1] == pytest.approx(off, rel=0.25, abs=0.02)  # both are bf16's rounding of other products
    assert printed["original"][1] > printed["dequantized"][1]


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _tokens(base: Path, rows: Path) -> list[torch.Tensor]:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    messages = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in messages]
    return [torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"][:64]) for t in texts]


def _learned(base: Path, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tokens after each ``<|im_start|>assistant``, through the end of turn, row by row."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    masks = []
    for ids in rows:
        mask, inside = torch.zeros(len(ids), dtype=torch.bool), False
        values = ids.tolist()
        for place, value in enumerate(values):
            mask[place] = inside
            inside = inside and value != end
            inside = inside or (values[max(place - len(head) + 1, 0) : place + 1] == head)
        masks.append(mask)
    assert start in rows[0].tolist()
    return masks


def test_without_held_out_rows_nothing_is_begun(cli, tmp_path, tiny_model):
    folder = write_adapter(tiny_model, tmp_path / "adapter", lora())
    done = cli(
        "export", "what=merged", f"adapter={folder}", "export.compare=true", "export.to=out", "launcher.device=cpu"
    )
    assert done.returncode == 2 and "export.compare:" in done.stderr and "held-out" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
