"""NF4 codes by the table are bitsandbytes', bit for bit, for every bfloat16 weight."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.config.schema import BLOCK_SIZES
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.quant.lookup import quantize_nf4


def _theirs(weights: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weights, block_size, "nf4", torch.uint8)
    return codes.view(-1), absmax


def _require_same(weights: torch.Tensor, block_size: int) -> None:
    found = quantize_nf4(weights, block_size)
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, _theirs(weights, block_size), strict=True))


def _bfloat16(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("exponent", [12, 13, 60, 127, 200, 251], ids=lambda e: f"2^{e - 127}")
def test_every_weight_below_every_absmax_of_a_binade(exponent):
    for mantissa in range(0, 128, 1 if exponent == 127 else 9):
        absmax = exponent << 7 | mantissa
        below = torch.arange(max(0, absmax - 14 * 128), absmax + 1)
        below = torch.nn.functional.pad(below, (0, -len(below) % 63))
        blocks = torch.cat([torch.full((len(below) // 63, 1), absmax), below.view(-1, 63)], dim=1)
        positive = _bfloat16(blocks.view(-1))
        _require_same(torch.cat([positive, -positive]), 64)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_weights_of_all_magnitudes(block_size):
    random = torch.Generator().manual_seed(block_size)
    weights = torch.randn(64 * block_size, generator=random) * torch.randn(64 * block_size, generator=random).exp() ** 5
    weights = weights.bfloat16()
    weights[:block_size], weights[block_size : 2 * block_size] = 0.0, -0.0
    weights[2 * block_size : 2 * block_size + 2] = torch.tensor([1e-40, -1e-40])  # less than a normal number
    _require_same(weights, block_size)


@pytest.mark.parametrize("value", [1e-40, -1.2e-38, 3e38, torch.inf, torch.nan])
def test_what_the_table_does_not_hold_is_left_to_bitsandbytes(value):
    weights = torch.zeros(128).bfloat16()
    weights[70] = value
    assert quantize_nf4(weights, 64) is None
    found, wanted = build_format("nf4").quantize_run(weights, 1), _theirs(weights, 64)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1].nan_to_num(), wanted[1].nan_to_num())
