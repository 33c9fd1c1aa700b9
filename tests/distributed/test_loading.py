"""What each rank reads, quantizes and holds."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import NumericsError, PlanError
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import ROW_ELEMENTS, bits_to_float, raw_bytes, rows_to_bytes
from tests import tiny
from tests.build import build, whole


def _gathered(ranks: Ranks, folder: str, quant: dict) -> dict:
    prepared = build(ranks, folder, quant=quant)
    found = {}
    for name, module in prepared.model.base.named_modules():
        if isinstance(module, QuantLinear):
            parts = {k: p for k in ("packed", "absmax", "nested") if (p := getattr(module, k)) is not None}
            found[name.removesuffix(".base_layer")] = {
                **{k: whole(p) for k, p in parts.items()},
                "offset": module.offset,
                "rows": [local_tensor(p).shape[0] for p in parts.values()],
            }
    return found if ranks.is_main else {name: {"rows": v["rows"]} for name, v in found.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_sharded_bytes_equal_bitsandbytes(pool, tiny_model, num_ranks, name, double_quant):
    results = pool.run(num_ranks, _gathered, str(tiny_model), {"name": name, "double_quant": double_quant})
    weights = load_file(tiny_model / "model.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert results[0]
    for layer, found in results[0].items():
        weight = weights[f"{layer}.weight"]
        codes, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type=name)
        blocks = build_format().num_statistics(1, weight.numel())
        assert torch.equal(rows_to_bytes(found["packed"], weight.numel()), codes.reshape(-1)), layer
        absmax = found["absmax"].reshape(-1)[:blocks]
        if double_quant:
            assert torch.equal(absmax, state.absmax.reshape(-1)), layer
            assert torch.equal(bits_to_float(found["nested"]).reshape(-1), state.state2.absmax), layer
            assert torch.equal(found["offset"].reshape(()), state.offset), layer
        else:
            assert torch.equal(bits_to_float(absmax), state.absmax), layer
        held = [r[layer]["rows"] for r in results]
        assert [sum(part) for part in zip(*held, strict=True)] == [found["packed"].shape[0]] * len(held[0])
    torch.set_num_threads(threads)


def _load_report(ranks: Ranks, folder: str) -> dict:
    load = build(ranks, folder).load
    return {"read": load.bytes_read / load.file_bytes, "quantized": load.quantized_bytes}


def test_each_rank_reads_and_holds_its_half_of_the_real_model(pool, real_model):
    reports = pool.run(2, _load_report, str(real_model))
    whole = sum(r["quantized"] for r in reports)
    assert all(r["read"] <= 0.55 for r in reports)
    assert all(r["quantized"] <= 0.52 * whole for r in reports)


def _planned_and_real(ranks: Ranks, folder: str, quant: dict) -> dict:
    prepared = build(ranks, folder, quant=quant)
    planned, real = prepared.plan.bytes, {"packed": 0, "statistics": 0, "kept": 0, "adapters": 0, "dense": 0}
    for name, parameter in prepared.model.named_parameters():
        local = local_tensor(parameter)
        size = local.numel() * local.element_size()
        last = name.rpartition(".")[2]
        kind = {"packed": "packed", "absmax": "statistics", "nested": "statistics"}.get(last, "kept")
        real["adapters" if parameter.requires_grad else kind] += size
    dense = [module.dense for module in prepared.model.modules() if isinstance(module, QuantMatrices)]
    real["dense"] = sum(tensor.nbytes for tensor in dense if tensor is not None)
    plan = {
        "packed": planned.base_packed, "statistics": planned.base_statistics, "kept": planned.base_kept,
        "adapters": planned.adapters, "dense": planned.base_dense,
    }  # fmt: skip
    return {"planned": plan, "real": real}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["nf4", "none"])
def test_planned_bytes_are_the_real_ones_of_the_fullest_rank(pool, tiny_model, num_ranks, name):
    results = pool.run(num_ranks, _planned_and_real, str(tiny_model), {"name": name, "double_quant": name == "nf4"})
    assert results[0]["real"] == results[0]["planned"]


@pytest.mark.parametrize("tied", [True, False])
def test_many_files_and_untied_heads_load(pool, tmp_path, tied):
    folder = tiny.make_model(tmp_path / "model", max_shard_size="200KB", tie_word_embeddings=tied, attention_bias=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert pool.run(2, _logits_equal_dequantized_reference, str(folder)) == [True, True]


def _logits_equal_dequantized_reference(ranks: Ranks, folder: str) -> bool:
    """Compare the sharded model's logits with a plain transformers model whose weights went through bitsandbytes."""
    from transformers import AutoModelForCausalLM

    prepared = build(ranks, folder, precision={"name": "fp32"}, model={"name": folder, "attn_implementation": "eager"})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").float()
    for name in (x.linear.name for x in prepared.plan.quantized):
        weight = reference.get_submodule(name).weight
        codes, state = bnb.quantize_4bit(weight.data.bfloat16(), compress_statistics=True, quant_type="nf4")
        state.dtype, state.shape = torch.float32, torch.Size([1, weight.numel()])  # its CPU kernel errs where blocks
        weight.data = bnb.dequantize_4bit(codes, state).view(weight.shape)  # cross rows
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(prepared.model.logits(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
    return True


def _odd_bytes_survive(ranks: Ranks, precision: str) -> bool:
    from torch import nn

    from fsdp_qlora.parallel.shard import mixed_precision, shard_model

    layer = QuantLinear(256, 256, build_format())  # 4 rows
    model = nn.Sequential(nn.Sequential(layer), nn.Linear(256, 256, bias=False, device="meta"))
    shard_model(model, [[model[0]]], ranks, mixed_precision(precision))
    model.to_empty(device="cpu")
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)  # NaN, Inf, denormals: all
    packed = patterns[: 4 * ROW_ELEMENTS].reshape(4, ROW_ELEMENTS)
    packed = torch.stack([packed[0], packed[1], patterns[32640 : 32640 + ROW_ELEMENTS], patterns[-ROW_ELEMENTS:]])
    bits = torch.arange(2**31 - 4, 2**31, dtype=torch.int64).to(torch.int32).reshape(4, 1)  # NaN patterns of float32
    start, stop = ranks.shard_rank * 4 // ranks.shard_size, (ranks.shard_rank + 1) * 4 // ranks.shard_size
    with torch.no_grad():
        layer.packed.to_local().copy_(packed[start:stop])
        layer.nested.to_local().copy_(bits[start:stop])
    model[0].unshard()
    return torch.equal(raw_bytes(layer.packed), raw_bytes(packed)) and torch.equal(layer.nested, bits)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_bit_pattern_survives_the_gather(pool, num_ranks, precision):
    assert all(pool.run(num_ranks, _odd_bytes_survive, precision))


def _refusals(ranks: Ranks, folder: str) -> list[str]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from fsdp_qlora.checks.gather import verify_gather
    from fsdp_qlora.parallel.shard import require_sharded, shard_model

    said = []
    model = torch.nn.Sequential(QuantLinear(64, 64, build_format()))
    try:
        shard_model(model, [], ranks, MixedPrecisionPolicy(param_dtype=torch.float32))
    except PlanError as error:
        said.append(str(error))
    bare = torch.nn.Sequential(torch.nn.Sequential(QuantLinear(64, 64, build_format(double_quant=False))))
    bare[0][0].absmax = None  # the planted unit: packed bytes without integers beside them
    numbers = torch.nn.Sequential(torch.nn.Linear(64, 64, device="meta"))  # real numbers may be gathered as such
    shard_model(numbers, [], ranks, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        shard_model(bare, [[bare[0]]], ranks, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    except PlanError as error:
        said.append(str(error))
    prepared = build(ranks, folder)
    late = torch.nn.Linear(4, 4)
    prepared.model.add_module("late", late)
    try:
        require_sharded(prepared.model, ranks)
    except NumericsError as error:
        said.append(str(error))
    first = next(m for m in prepared.model.modules() if isinstance(m, QuantLinear))
    clean = torch.distributed.get_rank(ranks.group) != ranks.size - 1
    unit = prepared.model.base.get_submodule("model.layers.0")
    original = unit.unshard

    def corrupting(*args, **kwargs):  # a link that flips a bit on one rank
        out = original(*args, **kwargs)
        if not clean:
            with torch.no_grad():
                first.packed.view(torch.uint8)[0, 0] ^= 1
        return out

    unit.unshard = corrupting
    try:
        verify_gather(prepared.model, ranks)
    except NumericsError as error:
        said.append(str(error))
    return said


def test_what_would_train_wrongly_is_refused(pool, tiny_model):
    first, last = pool.run(2, _refusals, str(tiny_model))
    assert "would convert its packed bytes" in first[0]
    assert "0.0.packed" in first[1] and "would be gathered as torch.bfloat16" in first[1]
    assert "late.weight is trained but not sharded" in first[2]
    assert len(first) == 3 and "gathers different bytes" in last[3]
