"""The int8 base is LLM.int8: bitsandbytes' `Linear8bitLt` is the judge, bit for bit where it computes the same."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch

from fsdp_qlora.checkpoint.resume import blocking_settings, without
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import QuantSettings, RunConfig
from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.errors import NumericsError
from fsdp_qlora.quant.embedding import QuantEmbedding
from fsdp_qlora.quant.formats import build_format, quantize
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.packing import bits_to_float


def _layers(threshold: float, dtype: torch.dtype) -> tuple[QuantLinear, bnb.nn.Linear8bitLt]:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.1
    ours = QuantLinear(96, 40, build_format("int8", threshold=threshold), dtype=dtype, device="cpu")
    ours.fill(quantize(weight, ours.quant_format))
    theirs = bnb.nn.Linear8bitLt(96, 40, bias=False, has_fp16_weights=False, threshold=threshold)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return ours, theirs.to("cpu").eval()  # in training it multiplies dequantized weights on a CPU


def _input(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(2))
    x[0, 3, 11], x[1, 0, 50] = 9.0, -20.0  # outliers for a threshold of 6
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0, 30.0])
def test_equals_linear8bitlt_forward_and_backward(threshold, dtype):
    ours, theirs = _layers(threshold, dtype)
    x, y = _input(dtype).requires_grad_(), _input(dtype).requires_grad_()
    found, expected = ours(x), theirs(y)
    assert torch.equal(found, expected)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found.backward(slope)
    expected.backward(slope)
    assert torch.equal(x.grad, y.grad)


def test_a_threshold_keeps_planted_outliers_from_spoiling_the_rest():
    weight_free, _ = _layers(0.0, torch.float32)
    dense = weight_free.dequantize(torch.float32)
    exact = torch.nn.functional.linear(_input(torch.float32), dense)
    errors = {t: float((_layers(t, torch.float32)[0](_input(torch.float32)) - exact).norm()) for t in (0.0, 6.0, 30.0)}
    assert errors[0.0] == errors[30.0] > 2 * errors[6.0]  # 30 catches none of them


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_slices_of_rows_equal_the_whole(world_size):
    weight = torch.randn(41, 96).bfloat16()
    quant_format = build_format("int8")
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    ranges = [row_range(41, rank, world_size) for rank in range(world_size)]
    parts = [quant_format.quantize_run(weight[a:b].reshape(-1), 96) for a, b in ranges]
    assert torch.equal(torch.cat([c for c, _ in parts]), codes)
    assert torch.equal(torch.cat([m for _, m in parts]), absmax)
    whole = quantize(weight, quant_format)
    assert whole.packed.dtype == torch.int8 and tuple(whole.packed.shape) == (41, 96)
    assert torch.equal(bits_to_float(whole.absmax).reshape(-1), absmax)


def test_layout_has_one_byte_a_weight_and_four_a_row():
    quant_format = build_format("int8", double_quant=True, block_size=128, threshold=6.0)
    assert (quant_format.double_quant, quant_format.block_size, quant_format.threshold) == (False, 64, 6.0)
    assert quant_format.num_rows(41, 96) * (quant_format.row_bytes(96) + quant_format.statistics_bytes) == 41 * (96 + 4)
    assert build_format("nf4", threshold=6.0).threshold == 0.0


def test_weights_out_of_float16_are_refused():
    weight = torch.ones(2, 8)
    weight[1, 3] = 1e6
    with pytest.raises(NumericsError, match="65504"):
        quantize(weight, build_format("int8"))


def test_embedding_equals_bitsandbytes():
    table = torch.randn(30, 16)
    ours = QuantEmbedding(30, 16, build_format("int8"), torch.float32, device="cpu")
    ours.fill(quantize(table, ours.quant_format))
    theirs = bnb.nn.Embedding8bit(30, 16, dtype=torch.float32)
    theirs.weight = bnb.nn.Int8Params(table.clone(), requires_grad=False, has_fp16_weights=False)
    ids = torch.tensor([[0, 7, 29], [3, 3, 1]])
    torch.testing.assert_close(ours(ids), theirs.to("cpu")(ids), rtol=1e-6, atol=1e-6)
    assert (ours(ids) - table[ids]).abs().max() < 0.02


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens(tokens):
    ours, _ = _layers(6.0, torch.bfloat16)
    x = _input(torch.bfloat16)[0, :tokens].requires_grad_()
    out = ours(x)
    out.sum().backward()
    assert out.shape == (tokens, 40) and x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("quant", "read"),
    [
        ({}, {"double_quant", "block_size"}),
        ({"name": "int8", "double_quant": False}, {"llm_int8_threshold"}),
        ({"overrides": {"*.down_proj": "int8"}}, {"double_quant", "block_size", "llm_int8_threshold"}),
        ({"name": "int8", "embeddings": "nf4"}, {"double_quant", "block_size", "llm_int8_threshold"}),
        ({"name": "none"}, set()),
    ],
)
def test_options_that_no_format_of_the_run_takes_block_no_resume(quant, read):
    settings = QuantSettings(**quant)
    options = {"double_quant", "block_size", "llm_int8_threshold"}
    before = blocking_settings(to_dict(RunConfig(quant=settings)))
    assert {name for name in options if f"quant.{name}" in before} == read
    other = {"double_quant": not settings.double_quant, "block_size": 128, "llm_int8_threshold": 3.0}
    for name in options:
        now = blocking_settings(to_dict(RunConfig(quant=replace(settings, **{name: other[name]}))))
        assert (without(before, []) == without(now, [])) == (name not in read)
    # a checkpoint from before these were left out
    recorded = before | {f"quant.{name}": value for name, value in other.items() if name not in read}
    assert without(recorded, []) == before


def test_a_format_that_is_not_known_here_may_read_every_option():
    identity = {"quant.name": "exotic", "quant.block_size": 64, "quant.overrides": None}
    assert without(identity, []) == identity
