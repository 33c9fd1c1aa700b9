"""What we take of PEFT's: its dispatcher (private by name) and its file's keys."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.adapters.lora import attach_lora, initialize_adapters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.quant.formats import build_format
from fsdp_qlora.quant.swap import swap_linears
from fsdp_qlora.shapes.linears import quantized_linears
from fsdp_qlora.shapes.targets import target_linears


def _skeleton(folder):
    model = build_skeleton(folder, torch.bfloat16, "eager")
    return model, read_shapes(model)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "layers.1.mlp.down_proj"]])
def test_keys_and_shapes_equal_plain_pefts(tiny_model, quantized, targets):
    model, shapes = _skeleton(tiny_model)
    if quantized:
        swap_linears(model, quantized_linears(shapes), build_format())
    names = target_linears(shapes, targets)
    ours = attach_lora(model, names, r=3, alpha=6)
    assert any(isinstance(m, QuantLoraLinear) for m in ours.modules()) == quantized
    plain, _ = _skeleton(tiny_model)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=list(names))
    expected = get_peft_model_state_dict(get_peft_model(plain, config, low_cpu_mem_usage=True))
    found = dict(trainable_parameters(ours))
    assert {n: p.shape for n, p in found.items()} == {n: t.shape for n, t in expected.items()}
    assert all(p.dtype == torch.float32 for p in found.values())


def test_initial_values_do_not_depend_on_the_order_and_are_pefts_distribution(tiny_model):
    model, shapes = _skeleton(tiny_model)
    ours = attach_lora(model, target_linears(shapes, "all-linear"), r=8, alpha=8)
    ours.to_empty(device="cpu")
    initialize_adapters(ours, seed=1)
    first = {n: p.detach().clone() for n, p in trainable_parameters(ours)}
    initialize_adapters(ours, seed=1)
    assert all(torch.equal(first[n], p) for n, p in trainable_parameters(ours))
    for name, value in first.items():
        if ".lora_B." in name:
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound and value.std() > 0.4 * bound


def test_an_unknown_target_lists_the_real_ones(tiny_model):
    from fsdp_qlora.errors import PlanError

    _, shapes = _skeleton(tiny_model)
    with pytest.raises(PlanError, match="'query' matches none of the model's 14 linears; this model has q_proj"):
        target_linears(shapes, ["q_proj", "query"])
