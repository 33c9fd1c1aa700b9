"""EVA's directions and ranks; PEFT is the judge where it has a function, the formula where it has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import nn

from fsdp_qlora.adapters.eva import Directions, bounded, divide, most, settled
from fsdp_qlora.config.lora import LoraSettings
from fsdp_qlora.config.rules import check
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import ConfigError, NumericsError, PlanError
from fsdp_qlora.shapes.linears import LinearShape

FEATURES = 24


def _rows(step: int, tokens: int = 40, features: int = FEATURES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(tokens, features, generator=generator) * 9 * 0.6 ** torch.arange(features) + 3


def test_directions_are_the_principal_ones_of_all_rows() -> None:
    own = Directions(4, 0.99)
    for step in range(6):
        own.add(_rows(step))
    rows = torch.cat([_rows(step) for step in range(6)])
    _, values, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    cosines = (own.first(4, False) * right[:4]).sum(1).abs()
    assert cosines.min() > 0.99
    shares = values[:4] ** 2 / (values**2).sum()
    assert own.explained.tolist() == pytest.approx(shares.tolist(), rel=1e-2)
    assert own.settled.all()
    whitened = own.first(4, True) * values[:4].sqrt()[:, None]
    assert whitened.norm(dim=1).tolist() == pytest.approx([1.0] * 4, rel=1e-2)


@pytest.mark.parametrize("rows", [torch.full((40, FEATURES), torch.nan), torch.ones(40, FEATURES)])
def test_rows_without_directions_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(NumericsError):
        Directions(4, 0.99).add(rows)


class _Apart(nn.Module):
    """Four linears; the first two read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(FEATURES, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.c(y) + self.d(z)


def _inputs(step: int) -> dict[str, torch.Tensor]:
    return {"x": _rows(step), "y": _rows(step + 100) ** 2, "z": _rows(step + 200).tanh() * 2}


def test_ranks_are_pefts() -> None:
    """One linear gives up ranks to others, and of two that share an input the first gets the higher rank."""

    class Batches(list[Any]):
        """A sized iterable, as PEFT asks for."""

    config = LoraConfig(r=3, target_modules=["a", "b", "c", "d"], init_lora_weights="eva", eva_config=EvaConfig())
    wanted = get_eva_state_dict(
        _Apart(), Batches(_inputs(step) for step in range(20)), config, prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    leader = {"a": "a", "b": "a", "c": "c", "d": "d"}
    lora = LoraSettings(r=3, init_lora_weights="eva")
    own = {name: Directions(most(lora, name), 0.99) for name in ("a", "c", "d")}
    ranks = dict.fromkeys(leader, 6)
    for inputs in _steps():
        if all(bool(own[name].settled[: ranks[name]].all()) for name in own):
            break
        for name, rows in inputs.items():
            if not own[name].settled[: ranks[name]].all():
                own[name].add(rows)
        ranks = divide({name: x.explained for name, x in own.items()}, leader, 12)
    assert ranks == {name: len(a) for name, a in wanted.items()}
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 12 and ranks["a"] >= ranks["b"]
    for name, a in wanted.items():
        ours = own[leader[name]].first(ranks[name], False)
        assert (ours * a).sum(1).abs().min() > 0.999 if len(a) else len(ours) == 0


def _steps() -> Iterator[dict[str, torch.Tensor]]:
    for step in range(20):
        inputs = _inputs(step)
        yield {"a": inputs["x"], "c": inputs["y"], "d": inputs["z"]}


def test_settings_before_and_after() -> None:
    lora = LoraSettings(variant="eva", r=4, alpha=8, rank_pattern={"b": 2}, use_dora=True)
    linears = [LinearShape(name, 32, FEATURES) for name in ("x.a", "x.b", "x.c")]
    bound = bounded(lora, linears)
    assert bound.rank_pattern == {"x.a": 8, "x.c": 8} and bound.method == "dora" and not bound.starts_from_rows
    after = settled(lora, {"x.a": 7, "x.b": 3, "x.c": 0})
    assert after.target_modules == ["x.a", "x.b"] and after.rank_pattern == {"x.a": 7, "x.b": 3}
    assert after.alpha_pattern == {"x.a": 14, "x.b": 12} and after.start is None and after.method == "dora"
    kept = settled(LoraSettings(init_lora_weights="eva", r=4, eva_adjust_scaling_factors=False), {"x.a": 7, "x.b": 4})
    assert kept.alpha_pattern == {} and kept.rank_pattern == {"x.a": 7}
    with pytest.raises(PlanError, match=r"x\.a, which has 24 features"):
        bounded(LoraSettings(variant="eva", r=13), linears)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"eva_rho": 3.0}, "lora.eva_rho: is a setting of EVA"),
        ({"variant": "eva", "eva_rho": 0.5}, "lora.eva_rho: must be at least 1, got 0.5"),
        ({"variant": "eva", "eva_tau": 1.5}, "lora.eva_tau: must be between 0 and 1"),
        ({"variant": "eva", "target_parameters": "experts"}, "lora.target_parameters: adapters on stacked experts"),
        ({"variant": "eva", "init_from": "folder"}, "lora.init_from: an adapter that is there already"),
        ({"variant": "vera", "init_lora_weights": "eva"}, "lora.init_lora_weights: vera has no such switch"),
        (
            {"variant": "eva", "init_lora_weights": "pissa"},
            "lora.init_lora_weights: pissa contradicts lora.variant=eva",
        ),
    ],
)
def test_what_cannot_be_is_refused(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(from_dict({"model": {"name": "x"}, "lora": lora}))
