"""Runs of 20 steps are those of transformers' own `Trainer` with stock bitsandbytes and PEFT, on 1 rank and on 2.

`Trainer` starts from what we export before the first step: its base is loaded by ``from_pretrained`` with a
`BitsAndBytesConfig`, in the class that the exported config names, and the adapter and the trained head by
``PeftModel.from_pretrained``. It reads the rows of each of our steps: texts, recordings and images as one batch of our
collator (masks, augmentation and order are ours), conversations with images one by one, as stock processors make them.
Compared are the loss, learning rate, gradient norm and clipped gradients of each step, and the adapter at the end.

Where the two differ by definition, and what is done here:

- Which modules stay in 32 bits. transformers quantizes a head with a bias even where PEFT trains it whole, the pooler,
  and the dense layer of BERT's head for masks; we do not quantize what comes after the layers, nor a vision tower.
  `KEPT` is given to bitsandbytes as ``llm_int8_skip_modules``. With it, the same modules are in 4 bits.
- A warm-up begins at 0 there and above 0 here: there is none.
- Of several micro-batches, `Trainer` divides the loss of some classes (BERT's, ViT's) by their number, not by that of
  all rows or tokens: it gets one of 4 rows, and we take two of 2. Where it counts all tokens (conversations), it gets four.
- Adam divides by the gradient's size, so an element whose gradient is rounding alone moves at random: ``eps`` is 1e-6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from fsdp_qlora.optim.decay import undecayed_parameters
from tests.families import FAMILIES, OTHERS
from tests.image_chats import chat_case, upstream_row
from tests.images import VISION
from tests.objectives import CASES
from tests.stock_trainer import Start, differences, in_4_bits, run, start, stock_model, stock_run
from tests.tolerances import FP32_LOSSES

pytestmark = pytest.mark.full
KINDS = {
    "T5": "t5", "T5, heads apart": "t5, heads apart", "BART": "bart, int8", "Marian": "marian, not quantized",
    "Whisper": "whisper", "BERT, sequences": "bert, pairs and numbers", "BERT, words": "bert, words",
    "BERT, masked": "bert, masked", "Llama, sequences": "llama, names", "ViT": "vit",
    "DINOv2": "dinov2, none quantized", "Swin": "swin, int8",
}  # fmt: skip
"""Name -> key in `CASES`. All are quantized to NF4 here."""
CHATS = {"LLaVA": "llava", "Qwen2-VL": "qwen2_vl"}
KEPT: dict[str, list[str]] = {
    "BERT, sequences": ["classifier", "bert.pooler.dense"], "BERT, words": ["classifier"],
    "BERT, masked": ["cls.predictions"], "ViT": ["classifier"], "DINOv2": ["classifier"], "Swin": ["classifier"],
    "LLaVA": ["model.vision_tower", "model.multi_modal_projector", "lm_head"], "Qwen2-VL": ["model.visual", "lm_head"],
}  # fmt: skip
"""What bitsandbytes leaves in 32 bits; elsewhere, what transformers chooses."""
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"check": "off"},
    "quant": {"name": "nf4", "double_quant": True},
    "schedule": {"name": "linear", "warmup_ratio": 0.0},
    "optim": {"lr": 2e-3, "weight_decay": 0.1, "eps": 1e-6},
    "train": {"max_steps": 20, "global_batch_size": 4, "micro_batch_size": 2, "max_grad_norm": 0.15},
}


def _batches(name: str, model: Path, groups: dict[str, Any], given: Start) -> list[list[dict[str, Any]]]:
    """Return the micro-batches of each step for `Trainer`."""
    if name in KINDS:
        return [[CASES[KINDS[name]].inputs(batch)] for batch in given.batches]
    file = Path(groups["data"]["train"])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [[upstream_row(model, CHATS[name], lines[n], file.parent) for n in rows] for rows in given.rows]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*KINDS, *CHATS])
def test_20_steps_are_those_of_the_stock_trainer(pool, tmp_path, record_property, name):
    model, groups = CASES[KINDS[name]].write(tmp_path) if name in KINDS else chat_case(tmp_path, CHATS[name])
    groups |= SETTINGS
    given = pool.run(1, start, model, str(tmp_path), groups)[0]
    stock = stock_model(Path(model), given.adapter, KEPT.get(name))
    assert in_4_bits(stock) == given.quantized
    wanted = stock_run(stock, tmp_path / "stock", groups, _batches(name, Path(model), groups, given))
    assert len(wanted.losses) == len(wanted.gradients) == 20 and max(wanted.norms) > 0.15
    for num_ranks in (1, 2):
        ours = pool.run(num_ranks, run, model, str(tmp_path), f"on-{num_ranks}", groups)[0]
        off = differences(ours, wanted)
        record_property(f"{num_ranks} ranks", off)
        assert max(off.values()) < FP32_LOSSES, off


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "t5", "bart", "bert", "vit", "dinov2", "swin"]
)
def test_what_decays_is_what_the_stock_trainer_decays(tmp_path, family):
    """All parameters of a whole model: biases and norms do not."""
    known: dict[str, Any] = FAMILIES | OTHERS | VISION
    model = AutoModel.from_config(AutoConfig.for_model(family, **known[family]))
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
    names, left_out = {name for name, _ in model.named_parameters()}, set(undecayed_parameters(model))
    assert names - left_out == names.intersection(trainer.get_decay_parameter_names(model)) != set()
    assert left_out
