"""On a GPU: int8 and every block size are what bitsandbytes makes there. FSDP_QLORA_TEST_DEVICE=cpu is a dry run."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from fsdp_qlora.config.schema import BLOCK_SIZES
from fsdp_qlora.quant.backend import bitsandbytes_backend
from fsdp_qlora.quant.formats import build_format, dequantize, quantize
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.packing import rows_to_bytes
from tests.gpu.test_gpu import _HERE, DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HERE, reason=f"torch finds no {DEVICE} device here")]


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_is_linear8bitlt(threshold):
    weight = _draw(1, 512, 256) * 0.1
    ours = QuantLinear(256, 512, build_format("int8", threshold=threshold), device=DEVICE)
    ours.fill(quantize(weight.to(DEVICE), ours.quant_format))
    theirs = bnb.nn.Linear8bitLt(256, 512, bias=False, has_fp16_weights=False, threshold=threshold)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)  # type: ignore[call-arg]
    theirs = theirs.to(DEVICE).eval()
    x = _draw(2, 3, 32, 256)
    x[0, 5, 7] = 20.0
    mine, other = (x.to(DEVICE).requires_grad_() for _ in range(2))
    found, expected = ours(mine), theirs(other)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blocks_of_any_size_are_bitsandbytes(block_size, double_quant):
    weight = _draw(3, 512, 4096).to(DEVICE)
    quant_format = build_format("nf4", double_quant, block_size)
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    found = quantize(weight, quant_format)
    assert torch.equal(rows_to_bytes(found.packed, weight.numel()), codes.reshape(-1))
    back = dequantize(found, quant_format, (512, 4096), torch.bfloat16)
    torch.testing.assert_close(back, bnb.functional.dequantize_4bit(codes, state), rtol=1e-2, atol=1e-4)
    assert (back - weight).abs().max() < 0.8


def test_the_backend_has_a_name():
    assert "(" in bitsandbytes_backend(torch.device(DEVICE))
