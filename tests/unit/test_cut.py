"""The twin's config: sizes small, switches kept, a layer of each kind, rows that cross what the model's rows cross."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from fsdp_qlora.checks import small
from fsdp_qlora.checks.small import with_every_kind
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.cut import cut_config, shallow_config
from fsdp_qlora.model.skeleton import build_skeleton
from tests.families import OTHERS
from tests.matrix import small_config


def _cut(model_type: str, **more: Any) -> PreTrainedConfig:
    return cut_config(CONFIG_MAPPING[model_type](**more)).get_text_config()


@pytest.mark.parametrize(
    ("model_type", "more", "key", "kept"),
    [
        ("qwen3_moe", {"num_hidden_layers": 48, "mlp_only_layers": [0, 40]}, "mlp_only_layers", [0]),
        ("qwen3_moe", {"num_hidden_layers": 48, "mlp_only_layers": [40]}, "mlp_only_layers", [1]),
        ("bamba", {"num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27]}, "attn_layer_indices", [1]),
        ("lfm2", {"num_hidden_layers": 12, "full_attn_idxs": [2, 5, 8]}, "layer_types", ["conv", "full_attention"]),
        ("qwen3_next", {}, "linear_num_key_heads", 2),
        ("qwen3_next", {}, "linear_num_value_heads", 4),
        ("llama4_text", {}, "floor_scale", 16),
        ("recurrent_gemma", {}, "num_hidden_layers", 3),
    ],
)
def test_what_is_kept_of_lists_counts_and_scales(model_type, more, key, kept):
    assert getattr(_cut(model_type, **more), key) == kept


@pytest.mark.parametrize("cut", [cut_config, shallow_config])
def test_windows_positions_and_trained_lengths_are_crossed(cut):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4,
            "original_max_position_embeddings": 4096}  # fmt: skip
    config = CONFIG_MAPPING["phi3"](sliding_window=2048, max_position_embeddings=131072, rope_parameters=rope)
    for max_length, trained in ((2048, 64), (8192, 16)):
        found = cut(config, max_length)
        assert (found.sliding_window, found.max_position_embeddings) == (16, 128)
        assert found.rope_parameters["original_max_position_embeddings"] == trained
    assert cut(config).hidden_size == (config.hidden_size if cut is shallow_config else 64)


class OwnConfig(LlamaConfig):
    """Says in a way of its own which layers are otherwise, counted from 1."""

    model_type = "own_kinds"

    def __init__(self, places: Any = None, **more: Any) -> None:
        """Keep the places as they are."""
        super().__init__(**more)
        self.places = places or {"odd": [4, 8]}


class OddMlp(nn.Linear):
    """Another kind of layer."""


class OwnForCausalLM(LlamaForCausalLM):
    """Has another MLP in some layers."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        """Exchange them."""
        super().__init__(config)
        for number, layer in enumerate(self.model.layers, 1):
            if number in config.places["odd"]:
                layer.mlp = OddMlp(config.hidden_size, config.hidden_size)


AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)


def test_kinds_that_settings_hide_are_seen_in_what_layers_are_made_of():
    found = with_every_kind(cut_config, OwnConfig(num_hidden_layers=12), 64, None)
    assert found.num_hidden_layers == 4 and cut_config(OwnConfig(num_hidden_layers=12)).num_hidden_layers == 2
    with pytest.raises(ValueError, match="no layer like layer 9"):
        with_every_kind(cut_config, OwnConfig(num_hidden_layers=12, places={"odd": [10]}), 64, None)


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "gemma3_text", "jamba", "qwen3_next", "bailing_hybrid"])
def test_a_small_model_has_a_layer_of_each_kind(model_type):
    config = CONFIG_MAPPING[model_type]()
    kinds = {small.kind_of(layer) for layer in small.decoder_layers(small.on_meta(config, None))}
    cut = with_every_kind(cut_config, config, 64, None)
    assert kinds == {small.kind_of(layer) for layer in small.decoder_layers(small.on_meta(cut, None))}


def test_layers_that_are_left_out_at_random_are_refused(tmp_path: Path):
    config = small_config("opt")
    config.layerdrop = 0.1
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config_overrides\.layerdrop=0"):
        build_skeleton(tmp_path, torch.float32, "eager")
    build_skeleton(tmp_path, torch.float32, "eager", config_overrides={"layerdrop": 0.0})
    AutoConfig.for_model("bart", vocab_size=64, **OTHERS["bart"], decoder_layerdrop=0.1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config_overrides\.decoder_layerdrop=0"):
        build_skeleton(tmp_path, torch.float32, "eager")
    build_skeleton(tmp_path, torch.float32, "eager", config_overrides={"decoder_layerdrop": 0.0})
