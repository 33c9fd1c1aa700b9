"""Activation checkpointing: what is kept between forward and backward, and what is recomputed."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fsdp_qlora.attention import blockwise as attention
from fsdp_qlora.attention import varlen
from fsdp_qlora.quant import grouped, products

_ATEN = torch.ops.aten
DEAR = frozenset(
    [
        *products.BODIES, *grouped.BODIES, *attention.BODIES, *varlen.BODIES, _ATEN.mm.default, _ATEN.addmm.default,
        _ATEN._scaled_dot_product_flash_attention.default, _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default, _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ]
)  # fmt: skip
"""Ops whose results selective checkpointing keeps: products with weights, and attention if it is a single op."""


def checkpoint_activations(model: PreTrainedModel, kind: Literal["selective", "full"]) -> None:
    """Recompute decoder layers in backward instead of keeping activations: everything, or all except expensive ops.

    Non-reentrant, because the reentrant variant loses the gradients of adapters after a frozen embedding.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive_ops)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.train()  # transformers checkpoints in training mode only


def _keep_expensive_ops(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DEAR else CheckpointPolicy.PREFER_RECOMPUTE
