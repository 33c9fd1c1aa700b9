"""`quant=none lora=none`: sharded full fine-tuning equals a plain torch loop, and its result is a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.run.fit import fit
from fsdp_qlora.run.inference import load_for_inference
from tests import tiny
from tests.build import build, config_of, loaded_state, losses, run_fit, world_of
from tests.families import FAMILIES, write_family
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, close

FULL: dict[str, Any] = {"quant": {"name": "none", "double_quant": False}, "lora": {"variant": "none"}}
STEPS = 4
LOGITS = 1e-5
"""Largest difference of float32 logits, as a share of the largest."""


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
    (folder / "generation_config.json").unlink()
    rows = tiny.write_chat_rows(tmp_path / "rows.jsonl", 6)  # every step sees all of them
    settings = _settings(rows, "fp32")
    wanted, weights = _loop(folder, pool.run(1, _rows, str(folder), settings)[0])
    ours = pool.run(num_ranks, run_fit, str(folder), str(tmp_path), "full", settings)[0]["metrics"]
    assert close(losses(ours), wanted, FP32_LOSSES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model", dtype=torch.float32)
    for name, weight in model.named_parameters():  # AdamW moves a weight by at most lr a step
        assert float((weight - weights[name]).abs().max()) < 0.02 * STEPS * 1e-3, name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "full" / "model")) == model.config.vocab_size
    base = AutoModelForCausalLM.from_pretrained(folder)  # both stop where config.json says
    assert model.generation_config.eos_token_id == base.generation_config.eos_token_id is not None


def _held(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of this rank's masters, gradients and optimizer states after a step, and the planned ones."""
    prepared = build(ranks, folder, **groups)
    ids = torch.arange(24)[None]
    prepared.model.train()(ids, ids).sum().backward()
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    locals_ = [local_tensor(parameter) for parameter in prepared.model.parameters()]
    gradients = [local_tensor(p.grad) for p in prepared.model.parameters() if p.grad is not None]
    held = {
        "adapters": sum(tensor.nbytes for tensor in locals_),
        "gradients": sum(tensor.nbytes for tensor in gradients),
        "optimizer": optimizer.state_bytes(),
        "base_kept": 0,
    }
    planned = {kind: getattr(prepared.plan.bytes, kind) for kind in held}
    planned["gradients"] = 4 * prepared.plan.memory.held(prepared.plan.settings)
    return held, planned


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_16_bytes_a_parameter_exactly(pool, tmp_path, tied, precision, num_ranks):
    folder = tiny.make_model(tmp_path / "base", tie_word_embeddings=tied)
    of_ranks = pool.run(num_ranks, _held, str(folder), FULL | {"precision": {"name": precision}})
    planned = of_ranks[0][1]
    assert {kind: max(held[kind] for held, _ in of_ranks) for kind in planned} == planned
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert sum(sum(held.values()) for held, _ in of_ranks) == 16 * count


def _trained_logits(ranks: Ranks, folder: str, root: str, groups: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Train, and return the logits of the model that was trained."""
    prepared = build(ranks, folder, run={"output_root": root, "name": "logits"}, **groups)
    fit(prepared)
    with torch.no_grad():
        return prepared.model.eval().logits(ids).clone()


@pytest.mark.parametrize("family", some_in_full(FAMILIES, {"gpt2", "qwen3_moe"}))
def test_the_result_has_the_trained_models_logits(pool, tmp_path, family):
    """Tied or not, with biases, transposed linears, stacked experts, caps: named and laid out as in the base's files."""
    folder = write_family(tmp_path / "base", family)
    ids, rows = torch.arange(5, 37)[None], tiny.write_chat_rows(tmp_path / "rows.jsonl", 6)
    ours = pool.run(2, _trained_logits, str(folder), str(tmp_path), _settings(rows, "fp32"), ids)[0]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "logits" / "model").eval()
    assert result.dtype == torch.float32
    with torch.no_grad():
        theirs = result(ids).logits
        before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    size = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < LOGITS * size < float((before - theirs).abs().max())
    config = config_of(str(tmp_path / "logits" / "model"), **FULL, precision={"name": "fp32"})
    again = pool.run(2, _logits, config, ids)[0]
    assert float((again - theirs).abs().max()) < LOGITS * size


def _logits(ranks: Ranks, config: RunConfig, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model that is loaded as by `generate`."""
    prepared = load_for_inference(config, None, world_of(ranks))
    with torch.no_grad():
        return prepared.model.logits(ids).clone()


def _names(folder: Path) -> Iterator[str]:
    return (name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_bf16_learns_resumes_with_the_same_bits_and_stores_16_bits(pool, tmp_path):
    folder = tiny.make_model(tmp_path / "base")
    rows = tiny.write_chat_rows(tmp_path / "rows.jsonl", 12)
    settings = _settings(rows, "bf16") | {"checkpoint": {"every_steps": 2}}
    first = pool.run(2, run_fit, str(folder), str(tmp_path), "run", settings)[0]["metrics"]
    assert losses(first)[-1] < losses(first)[0]
    saved = str(tmp_path / "run" / "checkpoints" / "step_00000002")
    arguments = str(folder), str(tmp_path), saved, _settings(rows, "bf16")
    states = [pool.run(num_ranks, loaded_state, *arguments)[0] for num_ranks in (1, 2, 3)]
    assert states[0] == states[1] == states[2] and len(states[0]) >= 3 * len(list(_names(folder)))
    again = _settings(rows, "bf16") | {"checkpoint": {"resume": saved}}
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
