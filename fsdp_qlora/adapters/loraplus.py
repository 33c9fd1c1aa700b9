"""LoRA+ (https://arxiv.org/abs/2402.12354): learning rates by kind of tensor.

They are those of PEFT's ``create_loraplus_optimizer``: matrices B, and vectors, learn ``optim.loraplus_lr_ratio`` times
as fast as everything else, biases without weight decay, and the adapters of embeddings at a rate that PEFT sets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.optim.groups import Rate

EMBEDDING_LR = 1e-6
"""Peak learning rate of adapters of embeddings (PEFT's ``loraplus_lr_embedding``)."""


def is_faster(name: str, shape: Sequence[int]) -> bool:
    """Whether LoRA+ multiplies the learning rate of a trained tensor with this name in PEFT's file."""
    return not _of_embedding(name) and ("lora_B" in name or len(shape) == 1)


def _of_embedding(name: str) -> bool:
    return ".lora_embedding_" in name


def learning_rates(
    shapes: Mapping[str, Sequence[int]], settings: OptimSettings, undecayed: Collection[str] = ()
) -> dict[str, Rate]:
    """Return the rate of each trained tensor, given its shape, by name in PEFT's file.

    Without LoRA+, only those of tensors without weight decay: the ``undecayed`` ones.
    """
    if not settings.loraplus_lr_ratio:
        return {name: Rate(1.0, 0.0) for name in shapes if name in undecayed}
    return {name: _rate(name, shape, settings) for name, shape in shapes.items()}


def _rate(name: str, shape: Sequence[int], settings: OptimSettings) -> Rate:
    if _of_embedding(name):
        return Rate(EMBEDDING_LR / settings.peak_lr if settings.peak_lr else 0.0, settings.weight_decay)
    if not is_faster(name, shape):
        return Rate(1.0, settings.weight_decay)
    return Rate(settings.loraplus_lr_ratio, 0.0 if "bias" in name else settings.weight_decay)
