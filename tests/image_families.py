"""Image classifiers of transformers: a small model of each class, and our losses and gradients beside upstream's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

from fsdp_qlora.adapters.experts import peft_config
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.whole import as_saved
from fsdp_qlora.checks import reference
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.objectives import build_objective
from tests.build import build, whole
from tests.images import VISION, write_classes
from tests.objectives import upstream_model
from tests.tolerances import FP32_LOSSES

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
    said = {}
    for number, name in enumerate(FAMILIES):
        try:
            said[name] = _compared(ranks, Path(folder, str(number)), str(Path(folder, "train")))
        except FsdpQloraError as error:
            said[name] = f"refused ({error.exit_code}): {error}"
    return said


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
    settings: dict[str, Any] = {
        "objective": {"name": "image_classification", "augmentation": "none"},
        "precision": {"name": "fp32"},
        "model": {"check": "off"},
        "data": {"train": images},
    }
    prepared = build(ranks, str(base), **settings)
    data, plan = prepared.data, prepared.plan
    assert data is not None and data.train is not None
    objective = build_objective(prepared.settings.objective)
    batch = data.encoder.rows(data.train).collate([0, 1, 2, 3], 0)
    (ours, _), *_ = objective.sums(prepared.model.train(), batch).values()
    ours.backward()
    trained = dict(trainable_parameters(prepared.model))
    values = {n: whole(p).detach().clone() for n, p in trained.items()}
    own = {n: whole(p.grad).detach().clone() for n, p in trained.items() if p.grad is not None}
    model = upstream_model(prepared)
    config = peft_config(plan.targets, [], prepared.settings.lora, objective.task_type)
    adapted = reference.adapt(model, as_saved(config, plan.modules, prepared.shapes, model), values).train()  # type: ignore[arg-type]
    tensors = dict(batch.tensors)  # type: ignore[attr-defined]
    loss = adapted(pixel_values=tensors["pixel_values"], labels=tensors["label"][:, 0].long()).loss
    (loss * 4 * ranks.size).backward()  # each rank has computed the same rows, and ours are added up
    theirs = {n: p.grad for n, p in trainable_parameters(adapted) if p.grad is not None}
    prepared.close()
    if abs(float(ours) - float(loss) * 4) > FP32_LOSSES * abs(float(ours)):
        return f"loss {float(ours)} and not {float(loss) * 4}"
    if own.keys() != theirs.keys():
        return f"gradients of {min(own.keys() ^ theirs.keys())} on one side only"
    off = max(float((own[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12)) for n in own)
    return "equal" if off < 1e-4 else f"gradients are off by {off:.1e}"
