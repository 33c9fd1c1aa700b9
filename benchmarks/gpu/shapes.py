"""Folders of models that have a shape and no weights: config.json, a header, and a tokenizer of three words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.drawn import write_header
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.shapes.known import known_config
from fsdp_qlora.shapes.linears import ModelShapes

NAMES = {
    "llama8b": "meta-llama/Meta-Llama-3-8B",
    "moe": "Qwen/Qwen3-30B-A3B",
    "dense32b": "Qwen/Qwen3-32B",
    "mistral7b": "mistralai/Mistral-7B-v0.3",
}
"""The models whose shapes are measured: keys of `fsdp_qlora.shapes.known`."""
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL_EXPERTS = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Shape:
    """A model's folder and sizes."""

    name: str
    folder: Path
    vocab_size: int
    weights: int
    """All weights."""
    weights_of_token: int
    """N: the weights a token goes through, with embedding and head; of experts only those it is sent to."""


def write_shape(key: str, folder: Path, small: bool) -> Shape:
    """Write the folder of one of `NAMES`, or of a tiny model of the same family; return what it holds."""
    source = known_config(NAMES[key])
    assert source is not None, f"{NAMES[key]} is no known shape"
    config: dict[str, Any] = json.loads(source.read_text())
    if small:
        config |= SMALL | (SMALL_EXPERTS if "num_experts" in config else {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    shapes = read_shapes(build_skeleton(folder, torch.bfloat16, "eager"))
    write_header(folder, shapes.parameters)
    weights = sum(torch.Size(shape).numel() for shape in shapes.parameters.values())
    name = f"tiny {config['model_type']}" if small else NAMES[key].partition("/")[2]
    return Shape(name, folder, config["vocab_size"], weights, weights - _idle(shapes))


def _idle(shapes: ModelShapes) -> int:
    """Return the weights of the experts that a token is not sent to."""
    stacked = [x for x in shapes.linears if x.count > 1]
    return sum((x.count - min(shapes.experts_per_token, x.count)) * x.numel_each for x in stacked)


def _write_tokenizer(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
