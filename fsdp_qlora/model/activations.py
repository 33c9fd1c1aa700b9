"""What is kept between forward and backward, and whether the decoder layers are compiled."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in backward instead of keeping its activations.

    Non-reentrant: the reentrant kind loses the gradients of adapters behind a frozen embedding.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode only


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each decoder layer in place (before sharding): one graph for all layers of a kind."""
    for layer in layers:
        layer.compile()
