"""DoRA's norms: PEFT's own, and computed again only when A or B changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_qlora.adapters.names import ADAPTER, trainable_parameters
from fsdp_qlora.adapters.norms import StepNorms, follow_adapters, keep_norms
from fsdp_qlora.config.optim import OptimSettings
from fsdp_qlora.optim.optimizers import ShardedOptimizer


class Ops(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def _adapted(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4, bias=False))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"], use_dora=True, lora_dropout=dropout)
    adapted = get_peft_model(model, config)
    for _, parameter in trainable_parameters(adapted):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return adapted


def _grads(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    out = model(x)
    (out**2).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_pefts(dropout: float) -> None:
    stock, ours = _adapted(dropout), _adapted(dropout)
    keep_norms(ours)
    follow_adapters(ours)
    assert sum(type(m) is StepNorms for m in ours.modules()) == 2
    assert sum(type(m) is DoraLinearLayer for m in stock.modules()) == 2
    for number in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        (out, gradients), (wanted, theirs) = _grads(ours, x), _grads(stock, x)
        assert torch.allclose(out, wanted, atol=1e-5) and gradients.keys() == theirs.keys()
        assert all(torch.allclose(g, theirs[n], atol=1e-4, rtol=1e-4) for n, g in gradients.items())
        with torch.no_grad():
            for model in (stock, ours):
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(0.01 * p.grad)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_norms_are_computed_once_per_step(optimizer: str) -> None:
    """Also where the optimizer writes past torch's operators."""
    model = _adapted()
    keep_norms(model)
    follow_adapters(model)
    layer = model.base_model.model[0].lora_magnitude_vector[ADAPTER]
    sharded = ShardedOptimizer(trainable_parameters(model), OptimSettings(name=optimizer, lr=0.1))
    x, seen = torch.randn(5, 6), []
    for _ in range(2):
        with Ops() as ops:
            for _ in range(3):  # micro-batches
                (model(x) ** 2).sum().backward()
            model(x)
        assert ops.counts["aten::linalg_vector_norm"] == 2  # one a layer
        seen.append(layer._kept[1].clone())
        sharded.step(0.1)
    assert not torch.equal(*seen)
