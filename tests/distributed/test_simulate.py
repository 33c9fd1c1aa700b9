"""A simulated step takes the memory that a real one takes, counted by the same tracker on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_qlora.quant import gemm
from tests import tiny
from tests.pool import Pool
from tests.real_steps import require_alike
from tests.tiers import some_in_full

MANY_TOKENS = {"data": {"max_length": 128}, "train": {"global_batch_size": 4, "micro_batch_size": 2}}


@pytest.mark.parametrize(
    ("checkpointing", "quant"),
    some_in_full([("none", "nf4"), ("full", "nf4"), ("full", "int8")], [("none", "nf4"), ("full", "int8")]),
)
def test_simulated_peak_is_the_real_one(pool: Pool, tiny_model: Path, checkpointing: str, quant: str) -> None:
    train = {**MANY_TOKENS["train"], "activation_checkpointing": checkpointing}
    groups = {"quant": {"name": quant, "double_quant": quant == "nf4"}}
    require_alike(pool, tiny_model, {**MANY_TOKENS, **groups, "train": train})


@pytest.mark.full
def test_simulated_peak_of_waiting_gradients(pool: Pool, tmp_path: Path) -> None:
    """Untied, many heads, two micro-batches a rank, sdpa: gradients of the first wait whole for the second."""
    folder = tiny.make_model(tmp_path / "untied", tie_word_embeddings=False, num_hidden_layers=4)
    groups = {
        "model": {"attn_implementation": "sdpa"},
        "lora": {"r": 32},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    require_alike(pool, folder, groups)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "groups",
    [
        {"quant": {"name": "none"}},
        {"precision": {"name": "fp32"}},
        {"lora": {"r": 8, "dropout": 0.1}},
        {"data": {"max_length": 64, "packing": True}},
        {"fsdp": {"reshard_after_forward": False}},
        {"quant": {"cache_dequantized": "true"}},
        {"quant": {"block_size": 1024, "embeddings": "int8"}},
        {"quant": {"overrides": {"*.down_proj": "int8", "*.0.self_attn.*": "none"}}},
        {"train": {"activation_checkpointing": "selective"}},
        {"data": {"max_length": 1200}, "train": {"global_batch_size": 2, "micro_batch_size": 1}},
        {"debug": {"name": "plain"}},
        {"optim": {"name": "sgd", "lr": 1e-3}},
        {"optim": {"name": "adamw_8bit"}, "lora": {"r": 32}},
        {"optim": {"name": "adafactor"}, "lora": {"r": 32}},
        {"fsdp": {"adapters": "replicated"}},
        {"model": {"add_tokens": ["<|a|>", "<|b|>"]}},
        {"quant": {"name": "none"}, "lora": {"variant": "none"}},
        {"quant": {"name": "none"}, "lora": {"variant": "none"}, "precision": {"name": "fp32"}},
    ],
    ids=str,
)
def test_simulated_peak_of_every_kind_of_run(pool: Pool, tiny_model: Path, ranks: int, groups: dict[str, Any]) -> None:
    require_alike(pool, tiny_model, groups, ranks)


@pytest.mark.full
@pytest.mark.skipif(not gemm._has_product(torch.bfloat16), reason="this CPU multiplies in float32, which takes copies")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_simulated_peak_of_the_embedded_model(pool: Pool, real_model: Path, checkpointing: str) -> None:
    """30 layers: extrapolated from cuts, and compared with the whole on real ranks."""
    groups = {
        "data": {"max_length": 256},
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "activation_checkpointing": checkpointing},
    }
    assert require_alike(pool, real_model, groups) < 0.05
