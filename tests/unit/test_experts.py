"""Stacked experts: grouped products with adapters, PEFT's layout, and adapters of older PEFT files."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fsdp_qlora.adapters.experts import (
    StackedLora,
    before_exchange,
    experts_parameters,
    peft_config,
    short_parameters,
    stored_value,
)
from fsdp_qlora.adapters.fold import pieces_of
from fsdp_qlora.adapters.folder import AdapterConfig
from fsdp_qlora.adapters.lora import LoRA
from fsdp_qlora.adapters.method import spelt_out
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.quant import by_groups, stack
from fsdp_qlora.quant.formats import QuantizedTensor, build_format, quantize
from fsdp_qlora.quant.gemm import grouped, grouped_outer
from fsdp_qlora.quant.grouped import densify_stack, grouped_product
from fsdp_qlora.quant.stack import Stack, matrices_at_once
from fsdp_qlora.shapes.linears import LinearShape

COUNT, OUT, IN = 5, 24, 48
ROWS = (3, 0, 40, 19, 0)
"""Rows of each expert; two have none. On a CPU the first two runs are widened over the rows of others."""


def _stack(name: str = "nf4", out: int = OUT, width: int = IN) -> Stack:
    torch.manual_seed(0)
    quant_format = build_format(name)
    parts = [quantize(torch.randn(out, width) * 0.1, quant_format) for _ in range(COUNT)]
    nested = [p.nested for p in parts if p.nested is not None]
    offset = [p.offset for p in parts if p.offset is not None]
    quantized = QuantizedTensor(
        torch.cat([p.packed for p in parts]),
        torch.cat([p.absmax for p in parts]),
        torch.cat(nested) if nested else None,
        torch.stack(offset) if offset else None,
    )
    return Stack(COUNT, out, width, quantized, quant_format)


def _ends() -> torch.Tensor:
    return torch.tensor(ROWS).cumsum(0).to(torch.int32)


def _adapter(r: int, out: int = OUT, width: int = IN) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = torch.randn(COUNT * r, width) * 0.1, torch.randn(out, r * COUNT) * 0.1
    return down.requires_grad_(), up.requires_grad_()


def _by_hand(x, dense, down, up, scaling):
    """Each expert alone, as PEFT's `get_delta_weight` reads A and B."""
    a, b = down.view(COUNT, -1, dense.shape[2]), up.view(dense.shape[1], -1, COUNT)
    weights = dense + scaling * torch.einsum("ore,eri->eoi", b, a)
    return torch.cat([part @ w.t() for part, w in zip(x.split(list(ROWS)), weights, strict=True)])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("name", ["nf4", "int8", "dense", "kept"])
def test_a_grouped_product_and_its_gradients_equal_each_expert_alone(name, r, known):
    made = _stack("nf4" if name in ("dense", "kept") else name)
    dense = made.whole(0, COUNT, torch.float32)
    if name == "kept":
        made = densify_stack(made, torch.float32)
    if name == "dense":  # stored transposed, as gpt-oss's experts are
        turned = dense.transpose(1, 2).contiguous().transpose(1, 2)
        made = Stack(COUNT, OUT, IN, None, build_format(), turned)
    x = torch.randn(sum(ROWS), IN, requires_grad=True)
    down, up = _adapter(r)
    out = grouped_product(x, made, _ends(), list(ROWS) if known else [], (down, up, 0.7))
    wanted = _by_hand(x, dense, down, up, 0.7)
    assert (out - wanted).abs().max() < (2e-2 if name == "int8" else 1e-5)  # int8 rounds its inputs too
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (x, down, up), grad)
    theirs = torch.autograd.grad(wanted, (x, down, up), grad)
    for ours, exact in zip(mine, theirs, strict=True):
        assert (ours - exact).abs().max() < 1e-5
    without_rows = [e for e, rows in enumerate(ROWS) if rows == 0]
    assert (
        not mine[1].view(COUNT, r, IN)[without_rows].any() and not mine[2].view(OUT, r, COUNT)[..., without_rows].any()
    )


def test_without_an_adapter_only_ends_and_packed_weights_are_kept():
    made, x = _stack(), torch.randn(sum(ROWS), IN, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_product(x, made, _ends(), []).sum().backward()
    assert made.quantized is not None and len(kept) == 5  # ends, and the four tensors of the quantized weights
    assert any(t is made.quantized.packed for t in kept) and not any(t is x for t in kept)
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 8, 20])
def test_widths_that_grouped_mm_refuses_are_padded(dtype, width):
    x, w = torch.randn(sum(ROWS), width, dtype=dtype), torch.randn(COUNT, width + 3, width, dtype=dtype)
    out, outer = grouped(x, w, _ends()), grouped_outer(x, out := grouped(x, w, _ends()), _ends())
    wanted = torch.cat([part @ each.t() for part, each in zip(x.split(list(ROWS)), w, strict=True)])
    assert torch.allclose(out.float(), wanted.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    assert outer.shape == (COUNT, width, width + 3) and not outer[1].any() and not outer[4].any()


def test_an_accelerator_asks_the_host_only_if_the_experts_do_not_fit_at_once():
    assert matrices_at_once(128, 768 * 2048) < 128 and matrices_at_once(64, 1024 * 512) == 64
    assert matrices_at_once(8, 2**29) == 1


@pytest.mark.parametrize("together", [1, 2, COUNT])
@pytest.mark.parametrize("name", ["nf4", "int8", "dense"])
@pytest.mark.parametrize("r", [3, 4])
def test_the_products_of_an_accelerator_equal_each_expert_alone(monkeypatch, name, r, together):
    """They run on a CPU, too, where nothing but a test asks for them."""
    monkeypatch.setattr(stack, "matrices_at_once", lambda *_: together)
    made = _stack("nf4" if name == "dense" else name)
    dense = made.whole(0, COUNT, torch.float32)
    made = densify_stack(made, torch.float32) if name == "dense" else made.unnested()
    x, (down, up) = torch.randn(sum(ROWS), IN, requires_grad=True), _adapter(r)
    wanted = _by_hand(x, dense, down, up, 0.7)
    adapter = by_groups.Adapter.of(down.detach(), up.detach(), COUNT, 0.7)
    out = by_groups.product(x.detach(), made, _ends(), [], adapter)
    assert (out - wanted).abs().max() < (2e-2 if name == "int8" else 1e-5)
    grad = torch.randn_like(out)
    grad_x, grad_a, grad_b = by_groups.gradients(grad, x.detach(), made, _ends(), [], adapter, True)
    assert grad_a is not None and grad_b is not None
    mine = grad_x, grad_a.reshape(down.shape), grad_b.permute(1, 2, 0).reshape(up.shape)
    for ours, exact in zip(mine, torch.autograd.grad(wanted, (x, down, up), grad), strict=True):
        assert (ours - exact).abs().max() < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 64, 127])
def test_no_piece_of_a_stack_is_a_single_matrix_which_peft_takes_for_a_linear(count):
    stack = LinearShape("experts.down_proj", 8, 4, count=count, stacked=True)
    for weights in (1, 3 * 32, 10**6):
        pieces = pieces_of(stack, weights)
        assert [index for piece in pieces for index in range(count)[piece]] == list(range(count))
        assert count == 1 or min(piece.stop - piece.start for piece in pieces) >= 2


TARGETS = [
    LinearShape(f"model.layers.{i}.mlp.experts.{key}", 64, 32, count=4, stacked=True)
    for i in range(2)
    for key in ("gate_up_proj", "down_proj")
]


def test_names_and_shapes_are_pefts():
    lora = LoraSettings(r=8, rank_pattern={"*.experts.*": 2})
    trained = experts_parameters(LoRA(), TARGETS, lora)
    inner, outer = (list(trained[target.name].items()) for target in TARGETS[:2])
    assert inner[0] == ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", (8, 32))
    assert outer[1] == ("base_model.model.model.layers.0.mlp.experts.lora_B.weight", (64, 8))


def test_pefts_config_gives_experts_a_rank_and_an_alpha_of_their_own():
    names = short_parameters(TARGETS, [x.name for x in TARGETS])
    assert names == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    asked = LoraSettings(r=8, alpha=16, rank_pattern={"*.experts.*": 2}, alpha_pattern={"experts.down_proj": 4})
    lora = spelt_out(asked, [x.name for x in TARGETS])
    config = peft_config(["q_proj"], names, lora).to_dict()
    assert sorted(config["target_parameters"]) == names
    assert config["rank_pattern"] == {x.name: 2 for x in TARGETS}
    assert config["alpha_pattern"] == {x.name: 4 for x in TARGETS if "down" in x.name}
    assert peft_config(["q_proj"], [], LoraSettings()).to_dict()["target_parameters"] is None


CONFIG = AdapterConfig(
    8, 16.0, "lora", None, None, rank_pattern={r".*\.experts\..*": 2},
    parameters=["mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"],
)  # fmt: skip


def test_the_stored_wrappers_tell_which_weights_an_adapter_has():
    """The second layer has one wrapper, the first two, one in the other."""
    experts = "model.layers.{}.mlp.experts"
    modules = ["model.layers.0.mlp.gate", experts.format(0), experts.format(0) + ".base_layer", experts.format(1)]
    lora = CONFIG.settings(modules)
    assert lora.target_modules == ["model.layers.0.mlp.gate"]
    expected = [TARGETS[1].name, TARGETS[0].name, TARGETS[3].name]
    assert lora.target_parameters == expected and lora.rank_pattern == dict.fromkeys(expected, 2)
    assert short_parameters(TARGETS[:2], [x.name for x in TARGETS]) == sorted(x.name for x in TARGETS[:2])


@pytest.mark.parametrize("out", [64, 32])
def test_files_from_before_the_exchange_are_converted(tmp_path, out):
    """The delta that PEFT 0.18 computed from its file is the one computed from the converted tensors."""
    target = LinearShape("layer.experts.down_proj", out, 32, count=4, stacked=True)
    wrapper = StackedLora(torch.nn.Identity(), target, LoraSettings(r=3))
    old_a, old_b = torch.randn(4 * 3, out), torch.randn(32, 3 * 4)  # 0.18: [count * r, dim 1], [dim 2, r * count]
    save_file({"x.lora_A.weight": old_a, "x.lora_B.weight": old_b}, tmp_path / "adapter.safetensors")
    shapes = {"x.lora_A.weight": (12, 32), "x.lora_B.weight": (out, 12)}
    with safe_open(str(tmp_path / "adapter.safetensors"), "pt") as stored:
        a, b = (stored_value(stored, name, shape, wrapper, True) for name, shape in shapes.items())
        assert torch.equal(stored_value(stored, "x.lora_A.weight", (12, out), wrapper, False), old_a)
    wanted = torch.einsum("ore,eri->eio", old_b.view(32, 3, 4), old_a.view(4, 3, out))  # peft 0.18.0, ParamWrapper
    found = torch.einsum("ore,eri->eoi", b.view(out, 3, 4), a.view(4, 3, 32))
    assert a.shape == (12, 32) and b.shape == (out, 12) and torch.allclose(found, wanted, atol=1e-5)


def test_the_release_of_the_exchange():
    assert before_exchange("0.18.1") and before_exchange(None)
    assert not before_exchange("0.19.0") and not before_exchange("0.21.0")
