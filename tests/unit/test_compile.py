"""A decoder layer is one graph, one compilation serves all layers and lengths, and it computes what eager layers do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsdp_qlora.adapters.linear import use_fused_products
from fsdp_qlora.adapters.lora import attach_lora, initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.attention.candidates import attention_candidates
from fsdp_qlora.load.buffers import to_empty_but_buffers
from fsdp_qlora.model.config import load_config
from fsdp_qlora.model.families import decoder_layers
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.parallel.compile import COMPILED_TYPES, compile_layers, uncompiled, want_input_gradient
from fsdp_qlora.quant.formats import build_format, quantize
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.swap import swap_linears
from fsdp_qlora.shapes.linears import quantized_linears
from fsdp_qlora.shapes.targets import target_linears
from tests.families import FAMILIES, write_family


def _model(folder, dtype=torch.float32, alpha=8.0):
    """Return a small model with random 4-bit weights and adapters, and its layers."""
    attention = attention_candidates(torch.device("cpu"), None, load_config(folder), dtype)[0]
    base = build_skeleton(folder, dtype, attention)
    shapes = read_shapes(base)
    swap_linears(base, quantized_linears(shapes), build_format())
    model = attach_lora(base, target_linears(shapes, "all-linear"), r=4, alpha=alpha)
    use_fused_products(model)
    layers = decoder_layers(base)
    return model, base, layers


def _fill(model, base):
    to_empty_but_buffers(model, torch.device("cpu"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.is_floating_point() and "packed" not in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(value + 1.0 if parameter.dim() == 1 else value)
    for module in base.modules():
        if isinstance(module, QuantMatrices):
            module.fill(quantize(torch.randn(module.shape, generator=generator) * 0.05, module.quant_format))
    initialize_adapters(model, 0)
    for name, parameter in trainable_parameters(model):
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    model.train()


def _step(model, base, length):
    ids = torch.arange(2 * length).remainder(200).view(2, length)
    out = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    out.float().square().mean().backward()
    grads = [p.grad.clone() for _, p in trainable_parameters(model)]
    for _, p in trainable_parameters(model):
        p.grad = None
    return out.detach(), grads


def _compare(folder):
    model, base, layers = _model(folder)
    plain = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            compile_layers(layers)
            want_input_gradient(base.get_input_embeddings())
        _fill(model, base) if not compiled else None
        found = [_step(model, base, 40)]  # both lengths exceed every sliding window, so both come with masks
        if compiled:  # another length, and all layers: nothing is compiled again
            with torch.compiler.set_stance("fail_on_recompile"):
                found.append(_step(model, base, 56))
        else:
            found.append(_step(model, base, 56))
        plain.append(found)
    for (a, ga), (b, gb) in zip(*plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
        for x, y in zip(ga, gb, strict=True):
            assert (x - y).norm() <= 2e-3 * y.norm() + 1e-6
    return base


@pytest.mark.full
def test_layers_are_one_graph_compiled_once_and_compute_the_same(tiny_model):
    base = _compare(tiny_model)
    with uncompiled(), torch.no_grad():  # evaluation takes no compilation
        base.get_decoder()(input_ids=torch.zeros(1, 9, dtype=torch.long), use_cache=False)


@pytest.mark.full
@pytest.mark.parametrize("family", sorted(COMPILED_TYPES & set(FAMILIES)))
def test_each_family_that_auto_compiles(family, tmp_path):
    _compare(write_family(tmp_path / "model", family))


AGAIN = """
import json, sys
import torch
from pathlib import Path
from torch._dynamo.utils import compile_times, counters
from fsdp_qlora.parallel.compile import compile_layers, want_input_gradient
from tests.unit.test_compile import _fill, _model, _step
model, base, layers = _model(Path(sys.argv[1]), alpha=float(sys.argv[2]))
_fill(model, base)
plain = _step(model, base, 40)
compile_layers(layers)
want_input_gradient(base.get_input_embeddings())
out, grads = _step(model, base, 40)
torch.testing.assert_close(out, plain[0], rtol=2e-3, atol=2e-4)
worst = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, plain[1]))
print(json.dumps({"counters": dict(counters["aot_autograd"]), "worst": worst, "times": compile_times(aggregate=True)}))
"""


@pytest.mark.full
def test_a_second_process_takes_the_layer_from_the_cache_and_no_other_layer(tiny_model, tmp_path):
    """A layer with another scaling differs by a constant inside our `autograd.Function` alone."""
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    found = []
    for alpha in ("8", "8", "64"):
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, str(tiny_model), alpha], env=env, capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for one in found:
        assert one["worst"] < 2e-3
        assert "autograd_cache_bypass" not in one["counters"], one
        assert "compile_attempt_1" not in one["times"], "a layer is traced twice"
    assert [one["counters"].get("autograd_cache_hit", 0) for one in found] == [0, 1, 0]
