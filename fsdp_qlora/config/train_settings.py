"""Settings of the group ``train``, which is part of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config.auto import Auto, Switch
from fsdp_qlora.config.facts import MAY_CHANGE, NOT_NEGATIVE, POSITIVE

Checkpointing = Literal["auto", "none", "selective", "full"]
KernelsName = Literal["auto", "torch", "compile", "liger"]


@dataclass(frozen=True)
class TrainSettings:
    """The training loop."""

    max_steps: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Optimizer steps; 0 = as many as ``num_epochs`` needs."""
    num_epochs: Annotated[float | Auto, NOT_NEGATIVE, MAY_CHANGE] = "auto"
    """Passes over the training rows, when ``max_steps`` is 0. ``auto``: whole ones that make about 200 steps, 1 to 15.
    """
    global_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """Rows per optimizer step, over all ranks. ``auto``: 16, or fewer where an epoch would have fewer than 12 steps."""
    micro_batch_size: Annotated[int, POSITIVE] = 1
    """Rows per forward and backward pass on one rank."""
    eval_every: Annotated[int | Auto, NOT_NEGATIVE, MAY_CHANGE] = "auto"
    """Steps between evaluations; 0 = only before the first and after the last step. ``auto``: about five times between
    them, if the run has the steps for it and evaluating takes fewer rows than training."""
    micro_batch_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Instead of ``micro_batch_size``: tokens per micro-batch, padding included; 0 = off. A longer row forms a
    micro-batch alone."""
    eval_batch_size: Annotated[int, POSITIVE, MAY_CHANGE] = 8
    """Rows per forward pass in evaluation."""
    log_every: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 1
    """Steps between lines in metrics.jsonl and in the progress display; 0 = never."""
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Clip gradients to this global norm; 0 = never."""
    early_stopping_patience: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Stop after this many evaluations without improvement of the loss; 0 = never."""
    on_nonfinite: Annotated[Literal["stop", "skip", "rollback"], MAY_CHANGE] = "stop"
    """On a non-finite loss or gradient, or a loss spike: stop, skip the batch, or roll back. ``rollback`` returns to
    the last checkpoint and skips the batches since then. The update is never made, and the cause is always reported."""
    spike_factor: Annotated[float, NOT_NEGATIVE, MAY_CHANGE] = 0.0
    """Treat a loss above this multiple of the mean of the last 16 as a spike; 0 = never."""
    max_bad_steps: Annotated[int, POSITIVE, MAY_CHANGE] = 5
    """Consecutive bad steps after which ``skip`` and ``rollback`` also stop."""
    activation_checkpointing: Annotated[Checkpointing, MAY_CHANGE] = "auto"
    """Recompute decoder layers in backward: ``none``, ``selective`` or ``full``; ``auto`` takes the first that fits.
    ``selective`` keeps the results of matrix products and attention and recomputes the rest."""
    compile: Annotated[Switch, MAY_CHANGE] = "auto"
    """torch.compile the decoder layers; ``auto`` = if the run is long enough to recoup the compile time."""
    kernels: Annotated[KernelsName, MAY_CHANGE] = "auto"
    """Code that computes RMSNorms, gated activations and the loss: ``torch`` (upstream's modules), ``compile`` (each
    compiled on its own) or ``liger`` (Liger-Kernel, on GPUs). ``auto`` takes ``torch``."""
    logits_chunk: Annotated[int, POSITIVE, MAY_CHANGE] = 256
    """Supervised tokens whose logits are in memory at a time."""
    sample_prompts: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Prompts answered before and after training, shown in the summary."""
    sample_at_eval: Annotated[bool, MAY_CHANGE] = False
    """Also answer ``sample_prompts`` at every evaluation and append the answers to ``answers.jsonl``."""
    sample_tokens: Annotated[int, POSITIVE, MAY_CHANGE] = 48
    """Maximum length of these answers in tokens."""
    sample_held_out: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 3
    """Held-out prompts answered before and after training, and shown beside the answer wanted."""
