"""Experts that are modules of their own: each rank's tokens choose others, and still gradients add up by expert."""

from __future__ import annotations

import torch
from torch import nn

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.parallel.shard import mixed_precision, reach_all_experts, shard_model

EXPERTS, WIDTH = 4, 8


class Layer(nn.Module):
    """Routes each row to one expert by its number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))

    def forward(self, hidden_states: torch.Tensor, chosen: int) -> torch.Tensor:
        return hidden_states + self.experts[chosen](hidden_states)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor, chosen: int) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, chosen)
        return x.square().sum()


def _input(rank: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(rank))


def gradients(ranks: Ranks) -> list[torch.Tensor]:
    """Each rank takes another expert; return the gradients, whole."""
    model = Model()
    shard_model(model, [[layer] for layer in model.layers], ranks, mixed_precision("fp32"))
    reach_all_experts(model.layers)
    model(_input(ranks.rank), 1 + ranks.rank).backward()
    return [parameter.grad.full_tensor().clone() for parameter in model.parameters()]


def test_gradients_are_of_the_expert_that_was_chosen(pool):
    found = pool.run(2, gradients)[0]
    model = Model()
    for rank in range(2):
        model(_input(rank), 1 + rank).backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        wanted = torch.zeros_like(mine) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
