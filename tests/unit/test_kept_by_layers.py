"""What PEFT's layers keep is found by running them: formulas of three of them, by hand."""

from __future__ import annotations

import pytest

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.saved import Kept
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.shapes.linears import LinearShape

OUT, IN, R = 512, 256, 8
BY_HAND = {
    "vera": Kept(0, R + OUT, input=False),  # what d scales, and what b scales: the projections are frozen
    "ia3": Kept(OUT, OUT, input=False),  # the factors in the input's dtype; the product that they scale
    "miss": Kept(0, R, input=False),  # sums over blocks of inputs
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_a_layer_keeps(name):
    kept = build_method(name).kept(LinearShape("model.q_proj", OUT, IN), LoraSettings(variant=name, r=R))
    assert kept == BY_HAND[name]


def test_a_trained_matrix_needs_the_input():
    kept = build_method("loha").kept(LinearShape("model.q_proj", OUT, IN), LoraSettings(variant="loha", r=R))
    assert kept.input and kept.a_token == 0 and kept.fixed == pytest.approx(OUT * IN, rel=1e-3)


def test_each_tensor_is_known_apart():
    """`fsdp.offload=activations` moves the large ones only."""
    for name in BY_HAND:
        kept = build_method(name).kept(LinearShape("model.q_proj", OUT, IN), LoraSettings(variant=name, r=R))
        assert tuple(map(sum, zip(*kept.each, strict=True))) == (kept.fixed, kept.a_token)
    assert len(build_method("vera").kept(LinearShape("v", OUT, IN), LoraSettings(variant="vera", r=R)).each) == 2
