"""Image classifiers of transformers: a small model of each class, and our losses and gradients beside upstream's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

from fsdp_qlora.data.labels import ROWS
from fsdp_qlora.distributed.mesh import Ranks
from tests import one_batch
from tests.images import VISION, write_classes
from tests.objectives import Tensors

SIZE = 32
_BODY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE,
    "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [64, 128], "depths": [2, 2], "image_size": SIZE}
FAMILIES: dict[str, dict[str, Any]] = {
    **VISION,
    "deit": _BODY | {"architectures": ["DeiTForImageClassification"]},
    "dinov2_with_registers": VISION["dinov2"] | {"image_size": SIZE, "patch_size": 8},
    "beit": _BODY | {"use_absolute_position_embeddings": True, "drop_path_rate": 0.0},
    "beit, relative positions": _BODY | {"use_relative_position_bias": True, "drop_path_rate": 0.0},
    "data2vec-vision": _BODY | {"drop_path_rate": 0.0},
    "vit_msn": _BODY,
    "ijepa": _BODY,
    "swin, absolute positions": VISION["swin"] | {"use_absolute_embeddings": True},
    "swinv2": VISION["swin"],
    "clip": {"vision_config": _BODY | {"projection_dim": 32}, "text_config": {"vocab_size": 99, "num_hidden_layers": 1}},
    "siglip": {"vision_config": _BODY, "text_config": {"vocab_size": 99, "num_hidden_layers": 1}},
    "convnext": _STAGES | {"num_stages": 2, "drop_path_rate": 0.0},
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
    "poolformer": {"depths": [1, 1], "hidden_sizes": [32, 64], "num_encoder_blocks": 2, "drop_path_rate": 0.0,
                   "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
    "hiera": {"embed_dim": 32, "image_size": [SIZE, SIZE], "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2],
              "num_query_pool": 1, "masked_unit_size": [4, 4], "drop_path_rate": 0.0},
    "focalnet": {"image_size": SIZE, "embed_dim": 32, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3],
                 "drop_path_rate": 0.0},
}  # fmt: skip
"""Name -> settings of a small model; what precedes a comma is the model type."""


def write_families(folder: Path) -> Path:
    """Write each family's model, under its number, and images; return the folder."""
    write_classes(folder / "train", ["calm", "odd", "wild"], 6)
    for number, name in enumerate(FAMILIES):
        _write(folder / str(number), name)
    return folder


def verdicts(ranks: Ranks, folder: str) -> dict[str, str]:
    """Return for each family ``equal``, or the refusal with its exit code; anything else is a difference, in words."""
    images = str(Path(folder, "train"))
    return {name: _compared(ranks, Path(folder, str(number)), images) for number, name in enumerate(FAMILIES)}


def _write(folder: Path, name: str) -> None:
    config = AutoConfig.for_model(name.partition(",")[0], **FAMILIES[name])
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(str(folder))


def _compared(ranks: Ranks, base: Path, images: str) -> str:
    settings = {"objective": {"name": "image_classification", "augmentation": "none"}, "data": {"train": images}}
    return one_batch.outcome(ranks, base, settings, _labelled, ROWS)


def _labelled(tensors: Tensors) -> dict[str, Any]:
    return {"pixel_values": tensors["pixel_values"], "labels": tensors["label"][:, 0].long()}
