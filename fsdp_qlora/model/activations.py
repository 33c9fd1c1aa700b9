"""What is kept between forward and backward."""

from __future__ import annotations

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in backward instead of keeping its activations.

    Non-reentrant: the reentrant kind loses the gradients of adapters behind a frozen embedding.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode only
