"""Images made on the spot, and tiny random models that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, BitImageProcessorPil, ViTImageProcessorPil

VISION: dict[str, dict[str, Any]] = {
    "vit": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "dinov2": {"hidden_size": 64, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 42,
               "patch_size": 14, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "swin": {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4],
             "window_size": 4, "drop_path_rate": 0.0},
}  # fmt: skip
"""Model type -> settings of a model of two layers, or two stages."""
SIZES = {"vit": 32, "dinov2": 28, "swin": 32}
"""Height and width of the images that a model's processor makes. DINOv2 interpolates its table for any."""


def write_vision(folder: Path, family: str, **more: Any) -> Path:
    """Write a tiny model with random bf16 weights, as a checkpoint of its body alone, and its image processor."""
    config = AutoConfig.for_model(family, **{**VISION[family], **more})
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # larger than the usual 0.02, so that every part of the model matters
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    model.base_model.save_pretrained(folder)
    size = SIZES[family]
    if family == "dinov2":
        processor = BitImageProcessorPil(size={"shortest_edge": size + 4}, crop_size={"height": size, "width": size})
    else:
        processor = ViTImageProcessorPil(size={"height": size, "width": size})
    processor.save_pretrained(str(folder))
    return folder


def picture(number: int, width: int = 40, height: int = 36) -> Image.Image:
    """Return an image whose colours depend on ``number``: a gradient with some noise."""
    draw = np.random.default_rng(number)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(2 * np.pi * (x * (1 + number % 3) + y * channel / 2)) for channel in range(3)]
    pixels = 127 + 90 * np.stack(waves, axis=-1) + draw.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_classes(folder: Path, names: list[str], count: int) -> Path:
    """Write ``count`` PNGs, one after the other into each of the class folders ``names``."""
    for number in range(count):
        inside = folder / names[number % len(names)]
        inside.mkdir(parents=True, exist_ok=True)
        picture(number, 40 + number % 5, 36 + number % 7).save(inside / f"{number}.png")
    return folder
