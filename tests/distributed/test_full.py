"""`quant=none lora=none`: sharded full fine-tuning equals a plain torch loop, and its result is a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.config.rules import failures
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from tests import tiny
from tests.build import build, config_of, losses, run_fit
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, close

FULL: dict[str, Any] = {"quant": {"name": "none", "double_quant": False}, "lora": {"variant": "none"}}
STEPS = 4


def _settings(rows: Path, precision: str) -> dict[str, Any]:
    return {
        **FULL,
        "data": {"train": str(rows), "max_length": 64},
        "train": {"max_steps": STEPS, "global_batch_size": 6, "micro_batch_size": 1, "max_grad_norm": 0.0},
        "precision": {"name": precision},
        "optim": {"lr": 1e-3, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }


def _rows(ranks: Ranks, folder: str, groups: dict[str, Any]) -> list[tuple[list[int], list[bool]]]:
    """Return the tokens of each row, and which of them are learned."""
    prepared = build(ranks, folder, **groups)
    assert prepared.data is not None and prepared.data.train is not None
    rows = TokenRows(prepared.data.train)
    return [(ids.tolist(), learned.tolist()) for ids, learned in (rows.row(number) for number in range(len(rows)))]


def _loop(folder: Path, rows: list[tuple[list[int], list[bool]]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on all rows in each step with plain torch; return the losses and the weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    count, lines = sum(sum(learned[1:]) for _, learned in rows), []
    for _ in range(STEPS):
        total = torch.zeros(())
        for ids, learned in rows:
            labels = torch.tensor(ids[1:]).where(torch.tensor(learned[1:]), -100)
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        lines.append(float(total.detach()))
    return lines, dict(model.named_parameters())


@pytest.mark.parametrize("num_ranks", some_in_full([1, 2, 3], [1, 2]))
@pytest.mark.parametrize("tied", [True, False])
def test_equals_a_plain_loop_and_loads_with_from_pretrained(pool, tmp_path, tied, num_ranks):
    folder = tiny.make_model(tmp_path / "base", tie_word_embeddings=tied)
    rows = tiny.write_chat_rows(tmp_path / "rows.jsonl", 6)  # every step sees all of them
    settings = _settings(rows, "fp32")
    wanted, weights = _loop(folder, pool.run(1, _rows, str(folder), settings)[0])
    ours = pool.run(num_ranks, run_fit, str(folder), str(tmp_path), "full", settings)[0]["metrics"]
    assert close(losses(ours), wanted, FP32_LOSSES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model", dtype=torch.float32)
    for name, weight in model.named_parameters():  # AdamW moves a weight by at most lr a step
        assert float((weight - weights[name]).abs().max()) < 0.02 * STEPS * 1e-3, name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "full" / "model")) == model.config.vocab_size


def _held(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return this rank's bytes of masters and optimizer states, and the planned ones of the fullest rank."""
    prepared = build(ranks, folder, **groups)
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    held = sum(local_tensor(p).nbytes for p in prepared.model.parameters())
    planned = prepared.plan.bytes
    return held, optimizer.state_bytes(), planned.adapters + planned.base_kept, planned.optimizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_masters_and_states_exactly(pool, tmp_path, precision):
    folder = tiny.make_model(tmp_path / "base")
    of_ranks = pool.run(2, _held, str(folder), FULL | {"precision": {"name": precision}})
    assert (max(held for held, *_ in of_ranks), max(states for _, states, *_ in of_ranks)) == of_ranks[0][2:]


def test_bf16_learns_resumes_and_stores_16_bits(pool, tmp_path):
    folder = tiny.make_model(tmp_path / "base")
    rows = tiny.write_chat_rows(tmp_path / "rows.jsonl", 12)
    settings = _settings(rows, "bf16") | {"checkpoint": {"every_steps": 2}}
    first = pool.run(2, run_fit, str(folder), str(tmp_path), "run", settings)[0]["metrics"]
    assert losses(first)[-1] < losses(first)[0]
    saved = {"resume": str(tmp_path / "run" / "checkpoints" / "step_00000002")}
    again = _settings(rows, "bf16") | {"checkpoint": saved}
    more = pool.run(2, run_fit, str(folder), str(tmp_path), "again", again)[0]["metrics"]
    assert losses(more)[-2:] == losses(first)[-2:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"quant": {"name": "nf4"}}, "quant=nf4 quantizes"),
        ({"model": {"add_tokens": ["<|x|>"]}}, "model.add_tokens"),
        ({"fsdp": {"offload": "params"}}, "fsdp.offload=params"),
    ],
)
def test_what_does_not_go_with_it_is_named(groups, message):
    found = failures(config_of("x", **{**FULL, **groups}))
    assert len(found) == 1 and message in found[0]
