"""One product of base and adapters equals the products apart, gradients included, and keeps one input for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsdp_qlora.adapters.linear import SharedInput, use_fused_products
from fsdp_qlora.adapters.lora import attach_lora, initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.quant.formats import Format, build_format, quantize
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.products import densify, multiply, ops
from fsdp_qlora.quant.swap import swap_linears
from fsdp_qlora.shapes.linears import quantized_linears
from fsdp_qlora.shapes.targets import target_linears

SIZES = (96, 40, 40)
INTO = 64


def _matrices(quant_format: Format) -> list[QuantMatrices]:
    found = []
    for seed, out in enumerate(SIZES):
        made = QuantMatrices(INTO, out, quant_format, device="cpu")
        made.fill(quantize(torch.randn(out, INTO, generator=torch.Generator().manual_seed(seed)), quant_format))
        found.append(made)
    return found


def _adapters(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(9)
    down = [nn.Parameter(torch.randn(4 + i, INTO, generator=generator).to(dtype) * 0.2) for i in range(3)]
    up = [nn.Parameter(torch.randn(out, 4 + i, generator=generator).to(dtype) * 0.2) for i, out in enumerate(SIZES)]
    return down, up


@pytest.mark.parametrize("quant_format", [build_format(n, d) for n in ("nf4", "fp4") for d in (True, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
def test_equals_products_apart(quant_format, dtype, dense):
    matrices = [m.matrix() for m in _matrices(quant_format)]
    weights = [m.whole(dtype) for m in matrices]
    if dense:
        matrices = [densify(m, dtype) for m in matrices]
    x = torch.randn(2, 5, INTO, generator=torch.Generator().manual_seed(3)).to(dtype)
    scalings, found = [2.0, 0.5, 1.0], []
    for together in (True, False):
        y, (down, up) = x.clone().requires_grad_(), _adapters(dtype)
        if together:
            outs = multiply(y, matrices, down, up, scalings)
        else:
            outs = [y @ w.t() + (y @ a.t() @ b.t()) * s for w, a, b, s in zip(weights, down, up, scalings, strict=True)]
        slopes = torch.Generator().manual_seed(4)
        sum((o.float() * torch.randn(o.shape, generator=slopes)).sum() for o in outs).backward()
        found.append([*outs, y.grad, *(p.grad for p in (*down, *up))])
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).float().norm() <= limit * b.float().norm()


def test_outputs_that_nobody_uses_and_inputs_that_want_no_gradient():
    matrices, (down, up) = [m.matrix() for m in _matrices(build_format())], _adapters(torch.float32)
    x = torch.randn(5, INTO)
    multiply(x, matrices, down, up, [1.0] * 3)[1].square().sum().backward()
    assert x.grad is None and down[1].grad.abs().sum() > 0 and up[1].grad.abs().sum() > 0
    assert all(p.grad is None for i in (0, 2) for p in (down[i], up[i]))
    y = x.clone().requires_grad_()
    multiply(y, matrices)[2].sum().backward()  # no adapters: the base alone
    torch.testing.assert_close(y.grad, matrices[2].whole(torch.float32).sum(0).expand(5, INTO))


def test_backward_keeps_the_input_once_and_no_dense_weight():
    modules, (down, up) = _matrices(build_format()), _adapters(torch.float32)
    x = torch.randn(5, INTO, requires_grad=True)
    held = {t.data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())} | {
        p.data_ptr() for p in (*down, *up, x)
    }
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multiply(x, [m.matrix() for m in modules], down, up, [1.0] * 3)
    assert kept and all(t.untyped_storage().data_ptr() in held for t in kept)


def test_shapes_on_fake_tensors_are_the_real_ones():
    module, (down, up) = _matrices(build_format())[0], _adapters(torch.float32)
    q = module.matrix().quantized
    frozen = ([q.packed], [q.absmax], [q.nested], [q.offset])
    x = torch.randn(2, 5, INTO)
    with torch.no_grad():
        adapters = (down[:1], up[:1], [2.0])
        torch.library.opcheck(ops.linears.default, (x, *adapters, *frozen, [SIZES[0]], "nf4", 64))
        grads = ([torch.randn(2, 5, SIZES[0])], x, *adapters, *frozen, [SIZES[0]], INTO, "nf4", 64, True)
        torch.library.opcheck(ops.linears_backward.default, grads)
        dense = (q.packed, q.absmax, [q.nested], [q.offset], SIZES[0], INTO, "nf4", 64, torch.bfloat16)
        torch.library.opcheck(ops.dense.default, dense)


def _layers(folder, fused):
    base = build_skeleton(folder, torch.float32, "eager")
    shapes = read_shapes(base)
    swap_linears(base, quantized_linears(shapes), build_format())
    model = attach_lora(base, target_linears(shapes, "all-linear"), r=4, alpha=8)
    groups = use_fused_products(model) if fused else []
    model.to_empty(device="cpu")
    initialize_adapters(model, 0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trainable_parameters(model):
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    for number, module in enumerate(m for m in model.modules() if isinstance(m, QuantLinear)):
        weight = torch.randn(module.shape, generator=torch.Generator().manual_seed(number)) * 0.1
        module.fill(quantize(weight, module.quant_format))
    return model, base.get_submodule(shapes.layers[0]), groups


def test_layers_that_read_one_input_make_their_products_together(tiny_model):
    """The same numbers as apart; a second input, or the same layer twice, never gets what was made for another."""
    found = []
    for fused in (True, False):
        _, layer, groups = _layers(tiny_model, fused)
        x = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
        other = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(2))
        attention = layer.self_attn
        outs = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(x), attention.q_proj(x)]
        outs += [layer.mlp.gate_proj(x), layer.mlp.up_proj(x)]
        sum(o.square().sum() for o in outs).backward()
        found.append([*outs, x.grad])
        assert len(groups) == (4 if fused else 0)  # two a layer, two layers
        assert all(isinstance(g, SharedInput) for g in groups)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
