"""The settings of the groups ``optim`` and ``schedule``: a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config import choices


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer."""

    name: Annotated[str, choices.OPTIMIZERS] = "adamw"
    """AdamW, Lion, AdEMAMix (``_8bit``: states in 8 bits, by bitsandbytes), plain SGD with momentum, or Adafactor.
    The states of ``paged_`` ones may move to host memory when the GPU is full; on a CPU there is nothing to page."""
    lr: float = 2e-4
    """Peak learning rate. Adafactor's is relative to the size of each tensor: steps are ``lr`` times the root mean
    square of its values, or 0.001 if that is larger."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """First-moment decay (AdamW, Lion, AdEMAMix), momentum (SGD)."""
    beta2: float = 0.999
    """Second-moment decay (AdamW, AdEMAMix); what becomes of Lion's moment after the step."""
    beta3: float = 0.9999
    """Decay of the slow first moment (AdEMAMix)."""
    alpha: float = 5.0
    """Weight of the slow first moment (AdEMAMix)."""
    t_alpha: int = 0
    """Steps in which ``alpha`` rises from 0 (AdEMAMix); 0 = it is there at once."""
    t_beta3: int = 0
    """Steps in which ``beta3`` rises from ``beta1`` (AdEMAMix); 0 = it is there at once."""
    eps: float = 1e-8
    """Added to the root of the second moment (AdamW, AdEMAMix)."""
    override_32bit: list[str] = field(default_factory=list)
    """Patterns of parameter names (as in the adapter's file, ``["*.layers.0.*", "*.q_proj.lora_B.*"]``) whose states
    stay in 32 bits with an 8-bit optimizer. Those of fewer than 4096 elements do so anyhow."""


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the steps."""

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Decay to ``min_lr_ratio``: linearly, as a cosine, never, or only at the end (warm-up-stable-decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.03
    """Warm-up as a share of all steps, when ``warmup_steps`` is 0."""
    decay_ratio: float = 0.2
    """Share of the steps that decay (``wsd``)."""
    min_lr_ratio: float = 0.0
    """Last learning rate as a share of the peak."""
