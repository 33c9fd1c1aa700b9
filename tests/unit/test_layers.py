"""Which modules are a model's layers, where its class declares parts of them, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.errors import PlanError
from fsdp_qlora.model.families import decoder_layers
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.plan.plan import make_plan

WHOLE = {
    "longformer": ["LongformerLayer"] * 12, "roberta-prelayernorm": ["RobertaPreLayerNormLayer"] * 12,
    "funnel": ["FunnelLayer"] * 14, "bert": ["BertLayer"] * 12, "luke": ["LukeLayer"] * 12,
}  # fmt: skip
"""Model type -> classes of the layers: its own declares attention alone, or nothing (Funnel, in lists of lists)."""


def _on_meta(auto: Any, model_type: str, **settings: object) -> PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(CONFIG_MAPPING[model_type](**settings))


@pytest.mark.parametrize("model_type", WHOLE)
def test_a_layer_is_all_that_repeats(model_type):
    layers = decoder_layers(_on_meta(AutoModelForMaskedLM, model_type))
    assert [type(layer).__name__ for layer in layers] == WHOLE[model_type]


@pytest.mark.parametrize("model_type", ["blenderbot", "blenderbot-small", "led", "marian", "mvp", "pegasus"])
def test_both_sides_are_layers_where_transformers_declares_none(model_type):
    model = _on_meta(AutoModelForSeq2SeqLM, model_type, encoder_layers=2, decoder_layers=3)
    assert len(decoder_layers(model)) == 5


def test_a_class_that_cannot_recompute_its_layers_is_not_asked_to():
    shapes = read_shapes(
        _on_meta(AutoModelForSequenceClassification, "albert", hidden_size=768, num_attention_heads=12)
    )
    config = {"model": {"name": "x"}, "objective": {"name": "sequence_classification"}}
    assert make_plan(from_dict(config), shapes, 1, budget=1).settings.checkpointing == "none"
    config["train"] = {"activation_checkpointing": "full"}
    with pytest.raises(PlanError, match="the class of this model cannot recompute its layers; full is not possible"):
        make_plan(from_dict(config), shapes, 1)


def test_linears_outside_of_the_layers_do_not_stay_in_16_bits_without_a_word():
    """XLM's attention and its feed-forward are in separate lists, of which one is the layers."""
    shapes = read_shapes(_on_meta(AutoModelForSequenceClassification, "xlm"))
    config = {"model": {"name": "x"}, "objective": {"name": "sequence_classification"}, "quant": {"name": "nf4"}}
    with pytest.raises(PlanError, match=r"33 % of the weights of layers and linears would stay in 16 bits, .*q_lin"):
        make_plan(from_dict(config), shapes, 1)
    config["quant"]["allow_16bit"] = True
    assert make_plan(from_dict(config), shapes, 1).quantized
