"""4-bit embeddings and heads against the dense tables they stand for, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import ModelError, PlanError
from fsdp_qlora.heads.dense import LossHead
from fsdp_qlora.heads.quantized import QuantLossHead
from fsdp_qlora.heads.upstream import AfterHead
from fsdp_qlora.load.conversions import arrangement
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.plan.plan import make_plan
from fsdp_qlora.quant.embedding import QuantEmbedding
from fsdp_qlora.quant.formats import build_format, quantize
from fsdp_qlora.quant.matrices import QuantMatrices
from tests.families import write_family

VOCAB, HIDDEN = 1000, 192


def _filled(kind, quant_format, **settings):
    table = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)) * 0.1
    made = kind(**settings, quant_format=quant_format, device="cpu")
    made.fill(quantize(table, quant_format))
    return made


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looked_up_rows_are_the_dequantized_tables_to_the_bit(double_quant, dtype):
    settings = {"num_embeddings": VOCAB, "embedding_dim": HIDDEN, "dtype": dtype}
    embedding = _filled(QuantEmbedding, build_format("nf4", double_quant), **settings)
    ids = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([0, VOCAB - 1, VOCAB - 1])
    assert torch.equal(embedding(ids), embedding.dequantize(dtype)[ids])


def test_an_embedding_whose_rows_share_blocks_is_refused():
    with pytest.raises(PlanError, match=r"quant\.embeddings: the hidden size 100 is not a multiple of 64"):
        QuantEmbedding(10, 100, build_format(), torch.float32)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_sliced_head_has_the_dense_heads_losses_gradients_and_logits(monkeypatch, softcap, bias):
    monkeypatch.setattr("fsdp_qlora.quant.matrix.SLICE_WEIGHTS", 300 * HIDDEN)  # four slices
    matrices = _filled(QuantMatrices, build_format(), in_features=HIDDEN, out_features=VOCAB)
    generator = torch.Generator().manual_seed(2)
    shift = torch.nn.Parameter(torch.randn(VOCAB, generator=generator), requires_grad=False) if bias else None
    head = QuantLossHead(matrices, None, shift)
    linear = torch.nn.Linear(HIDDEN, VOCAB, bias=bias)
    linear.weight = torch.nn.Parameter(matrices.dequantize(torch.float32), requires_grad=False)
    if bias:
        linear.bias = shift
    dense = LossHead.from_linear(linear, AfterHead(), 7)
    head.logit_scale = dense.logit_scale = 0.5
    head.softcap = dense.softcap = softcap
    head.chunk = 7
    assert len(list(matrices.matrix().slices())) == 4
    hidden = torch.randn(40, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (40,), generator=generator)
    found = []
    for module in (head, dense):
        x = hidden.clone().requires_grad_()
        losses = module(x, labels=labels)
        (losses * torch.arange(40)).sum().backward()
        found.append((losses.detach(), x.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(head(hidden), torch.nn.functional.linear(hidden, linear.weight, linear.bias), atol=1e-5)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_very_large_matrix_is_multiplied_slice_by_slice(monkeypatch, double_quant):
    matrices = _filled(QuantMatrices, build_format("nf4", double_quant), in_features=HIDDEN, out_features=VOCAB)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(4))
    found = []
    for whole in (2**28, 1000):
        monkeypatch.setattr("fsdp_qlora.quant.matrix.WHOLE_WEIGHTS", whole)
        monkeypatch.setattr("fsdp_qlora.quant.matrix.SLICE_WEIGHTS", 300 * HIDDEN)
        y = x.clone().requires_grad_()
        out = matrices.matmul(y)
        out.square().sum().backward()
        with torch.no_grad():
            assert torch.allclose(matrices.matmul(y), out, rtol=1e-6)
        found.append((out.detach(), y.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


def test_layers_that_cannot_be_quantized_are_refused_unless_allowed():
    settings = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 64, "head_dim": 32,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **settings))
    shapes = read_shapes(model)
    known = tuple(x for x in shapes.linears if not x.stacked)  # as of a model whose experts are stored in another way
    shapes = replace(shapes, linears=known)
    config = {"model": {"name": "x"}, "quant": {"name": "nf4"}}
    with pytest.raises(
        PlanError, match=r"\d+ % of the weights of layers and linears would stay in 16 bits, the largest .*exp"
    ):
        make_plan(from_dict(config), shapes, 1)
    config["quant"]["allow_16bit"] = True
    assert make_plan(from_dict(config), shapes, 1).quantized


def test_experts_are_read_from_a_file_that_keeps_each_by_itself(tmp_path):
    folder = write_family(tmp_path / "model", "qwen3_moe")
    source = SafetensorsFolder(folder)
    skeleton = build_skeleton(folder, torch.bfloat16, "eager")
    source.arrange(arrangement(skeleton, source.entries))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert name not in source.entries and len(source.arranged[name]) == 8
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).get_parameter(name)
    stored = source.find(name, tuple(whole.shape))
    assert torch.equal(source.read(stored, 0, stored.numel), whole.reshape(-1))
    assert torch.equal(source.read(stored, 5000, 20000), whole.reshape(-1)[5000:20000])  # across parts
    del source.arranged[name]
    with pytest.raises(ModelError, match="no tensor"):
        source.find(name, tuple(whole.shape))
