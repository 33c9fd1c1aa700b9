"""DoRA's norms are computed once per optimizer step: the same numbers, fewer dequantizations, no more gathers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.norms import StepNorms
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from tests.build import build, whole
from tests.distributed.test_peft_methods import QUANT, _ids
from tests.tiers import some_in_full
from tests.unit.test_norms import Ops

TARGETS, STEPS, MICRO_BATCHES = 14, 3, 2


def _trained(ranks: Ranks, folder: str, groups: dict[str, Any], keep: bool) -> dict[str, Any]:
    """Train some steps; return losses, gradients, what was dequantized beside products, and what was gathered."""
    prepared = build(ranks, folder, **groups)
    model = prepared.model.train()
    if not keep:  # as PEFT: in every forward
        for module in model.modules():
            if isinstance(module, StepNorms):
                module._follows = None
    optimizer = ShardedOptimizer(trainable_parameters(model), prepared.config.optim)
    losses, gradients = [], []
    with Ops() as ops:
        for _ in range(STEPS):
            for _ in range(MICRO_BATCHES):
                loss = model(_ids(), _ids()).sum()
                loss.backward()
                losses.append(float(loss.detach()))
            gradients.append({n: whole(p.grad).clone() for n, p in trainable_parameters(model)})
            optimizer.step(2e-3)
    gathers = sum(count for name, count in ops.counts.items() if "allgather" in name or "all_gather" in name)
    dequantized = sum(count for name, count in ops.counts.items() if name == "bitsandbytes::dequantize_4bit")
    return {"losses": losses, "gradients": gradients, "dequantized": dequantized, "gathers": gathers}


@pytest.mark.parametrize(
    ("checkpointing", "quant", "num_ranks"),
    some_in_full(
        [(c, q, n) for c in ("none", "selective", "full") for q in ("nf4", "none") for n in (1, 2)],
        {("selective", "nf4", 2)},
    ),
)
def test_norms_are_computed_once_a_step(pool, tiny_model, checkpointing, quant, num_ranks):
    groups = {
        "lora": {"variant": "dora"}, "precision": {"name": "fp32"}, "model": {"check": "off"}, "quant": QUANT[quant],
        "train": {"activation_checkpointing": checkpointing}, "optim": {"lr": 2e-3},
    }  # fmt: skip
    kept, each = (pool.run(num_ranks, _trained, str(tiny_model), groups, keep)[0] for keep in (True, False))
    assert kept["losses"] == each["losses"] and len(set(kept["losses"])) == STEPS
    for ours, theirs in zip(kept["gradients"], each["gradients"], strict=True):
        assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
    assert kept["gathers"] == each["gathers"]
    if quant == "nf4":
        forwards = STEPS * MICRO_BATCHES * (1 if checkpointing == "none" else 2)
        assert each["dequantized"] - kept["dequantized"] == (forwards - STEPS) * TARGETS
        assert each["dequantized"] >= forwards * TARGETS
