"""Shards quantize as the whole does, bit for bit, and bitsandbytes is the judge."""

from __future__ import annotations

from math import gcd

import bitsandbytes.functional as bnb
import pytest
import torch

from fsdp_qlora.config.schema import BLOCK_SIZES
from fsdp_qlora.distributed.shards import row_range
from fsdp_qlora.quant.formats import QuantizedTensor, build_format, dequantize, one_thread, quantize, to_rows
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import ROW_WEIGHTS, bits_to_float, num_rows, rows_to_bytes

SHAPES = [(576, 1536), (7, 13), (100, 333), (1, 1), (16384, 3), (3, 5461), (64, 256), (129, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_slices_equal_the_whole(shape, name, double_quant, world_size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()
    quant_format = build_format(name, double_quant)
    flat, numel = weight.reshape(-1), weight.numel()
    with one_thread():
        codes, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type=name)
        ranges = [row_range(num_rows(numel), rank, world_size) for rank in range(world_size)]
        parts = [quant_format.quantize_run(flat[a * ROW_WEIGHTS : b * ROW_WEIGHTS], 1) for a, b in ranges]
        offset = torch.cat([absmax for _, absmax in parts]).mean() if double_quant else None
        shards = [to_rows(quant_format, c, m, offset, b - a) for (c, m), (a, b) in zip(parts, ranges, strict=True)]
    packed = torch.cat([s.packed for s in shards])
    absmax = torch.cat([s.absmax for s in shards]).reshape(-1)[: build_format().num_statistics(1, numel)]
    assert torch.equal(rows_to_bytes(packed, numel), codes.reshape(-1))
    if double_quant:
        nested = torch.cat([s.nested for s in shards])
        assert torch.equal(absmax, state.absmax.reshape(-1))
        assert torch.equal(bits_to_float(nested).reshape(-1), state.state2.absmax)
        assert torch.equal(offset, state.offset)
    else:
        assert torch.equal(bits_to_float(absmax), state.absmax)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantize_equals_bitsandbytes(shape, name, double_quant):
    weight = torch.randn(shape)
    quant_format = build_format(name, double_quant)
    with one_thread():
        codes, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type=name)
        state.shape = torch.Size([1, weight.numel()])
        expected = bnb.dequantize_4bit(codes, state).view(shape)
    assert torch.equal(dequantize(quantize(weight, quant_format), quant_format, shape, torch.float32), expected)


@pytest.mark.parametrize("shape", [(576, 1536), (100, 334), (640, 640), (40, 96)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_equal_bitsandbytes(shape, double_quant, block_size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    quant_format = build_format("nf4", double_quant, block_size)
    with one_thread():
        codes, state = bnb.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
        )
        state.shape = torch.Size([1, weight.numel()])  # of rows that blocks cross, its CPU kernel makes other numbers
        expected = bnb.dequantize_4bit(codes, state).view(shape)
    assert (expected - weight).abs().max() < 0.7
    found = quantize(weight, quant_format)
    assert torch.equal(rows_to_bytes(found.packed, weight.numel()), codes.reshape(-1))
    assert torch.equal(dequantize(found, quant_format, shape, torch.bfloat16), expected)
    # a slice that begins within a nested block has all that it needs
    layer = QuantLinear(shape[1], shape[0], quant_format, device="cpu")
    layer.fill(found)
    matrix = layer.matrix()
    step = ROW_WEIGHTS // gcd(ROW_WEIGHTS, shape[1])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        assert torch.equal(matrix.rows(start, stop, torch.bfloat16), expected[start:stop])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_quant_linear_equals_its_dequantized_weight(name, bias):
    torch.manual_seed(0)
    layer = QuantLinear(96, 40, build_format(name), bias=bias, dtype=torch.float32, device="cpu")
    layer.fill(quantize(torch.randn(40, 96), layer.quant_format))
    if bias:
        layer.bias.data.normal_()
    dense = layer.dequantize(torch.float32)
    x = torch.randn(5, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    torch.nn.functional.linear(y, dense, layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("count", [1, 3])
def test_matrices_kept_dense_give_the_same_bits_and_are_not_dequantized_again(monkeypatch, count):
    matrices = QuantMatrices(96, 40, build_format(), count, device="cpu")
    matrices.cache_dequantized = True
    parts = [
        quantize(torch.randn(40, 96, generator=torch.Generator().manual_seed(i)), build_format()) for i in range(count)
    ]
    join = [torch.cat([getattr(part, name) for part in parts]) for name in ("packed", "absmax", "nested")]
    offset = torch.stack([part.offset.reshape(()) for part in parts])
    matrices.fill(QuantizedTensor(*join, offset))
    x = torch.randn(5, 96, dtype=torch.bfloat16)

    def product(index):
        given = x.clone().requires_grad_()
        out = matrices.matmul(given, index)
        out.float().square().sum().backward()
        return out, given.grad

    before = [product(index) for index in range(count)]
    matrices.keep_dense(torch.bfloat16)
    assert "dense" not in matrices.state_dict() and matrices.dense.shape == (count, 40, 96)
    monkeypatch.setattr("fsdp_qlora.quant.matrix.dequantize", None)
    for index, found in enumerate(before):
        assert all(map(torch.equal, product(index), found))
        assert torch.equal(matrices.eval().matmul(x, index), found[0])
        matrices.train()
    monkeypatch.undo()
    matrices.matmul(x.float())  # another dtype is dequantized as before


def test_forward_keeps_nothing_full_size_for_backward():
    layer = QuantLinear(512, 512, build_format(), device="cpu")
    layer.fill(quantize(torch.randn(512, 512), layer.quant_format))
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(torch.randn(2, 512, dtype=torch.bfloat16, requires_grad=True))
    held = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert kept and all(t.untyped_storage().data_ptr() in held for t in kept)


def test_gradients_after_an_evaluation_equal_those_without():
    # bitsandbytes' own Linear4bit repacks itself in an eval forward on some CPUs, and its gradients are wrong after.
    layer = QuantLinear(256, 128, build_format(), device="cpu")
    layer.fill(quantize(torch.randn(128, 256), layer.quant_format))
    x = torch.randn(4, 256, dtype=torch.bfloat16, requires_grad=True)
    (before,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    (after,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    assert torch.equal(before, after)


def test_has_no_weight_that_could_be_taken_for_numbers():
    assert not hasattr(QuantLinear(64, 64, build_format()), "weight")
