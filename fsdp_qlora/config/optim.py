"""The settings of the groups ``optim`` and ``schedule``: a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config import choices
from fsdp_qlora.config.facts import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer."""

    name: Annotated[str, choices.OPTIMIZERS] = "adamw"
    """AdamW, Lion, AdEMAMix (``_8bit``: states in 8 bits, by bitsandbytes), plain SGD with momentum, or Adafactor.
    The states of ``paged_`` ones may move to host memory when the GPU is full; on a CPU there is nothing to page."""
    lr: Annotated[float, NOT_NEGATIVE] = 2e-4
    """Peak learning rate. Adafactor's is relative to the size of each tensor: steps are ``lr`` times the root mean
    square of its values, or 0.001 if that is larger."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, BELOW_ONE] = 0.9
    """First-moment decay (AdamW, Lion, AdEMAMix), momentum (SGD)."""
    beta2: Annotated[float, BELOW_ONE] = 0.999
    """Second-moment decay (AdamW, AdEMAMix); what becomes of Lion's moment after the step."""
    beta3: Annotated[float, BELOW_ONE] = 0.9999
    """Decay of the slow first moment (AdEMAMix)."""
    alpha: Annotated[float, NOT_NEGATIVE] = 5.0
    """Weight of the slow first moment (AdEMAMix)."""
    t_alpha: Annotated[int, NOT_NEGATIVE] = 0
    """Steps in which ``alpha`` rises from 0 (AdEMAMix); 0 = it is there at once."""
    t_beta3: Annotated[int, NOT_NEGATIVE] = 0
    """Steps in which ``beta3`` rises from ``beta1`` (AdEMAMix); 0 = it is there at once."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the root of the second moment (AdamW, AdEMAMix)."""
    override_32bit: list[str] = field(default_factory=list)
    """Patterns of parameter names (as in the adapter's file, ``["*.layers.0.*", "*.q_proj.lora_B.*"]``) whose states
    stay in 32 bits with an 8-bit optimizer. Those of fewer than 4096 elements do so anyhow."""


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the steps."""

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Decay to ``min_lr_ratio``: linearly, as a cosine, never, or only at the end (warm-up-stable-decay)."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of linear warm-up."""
    warmup_ratio: Annotated[float, BELOW_ONE] = 0.03
    """Warm-up as a share of all steps, when ``warmup_steps`` is 0."""
    decay_ratio: Annotated[float, SHARE] = 0.2
    """Share of the steps that decay (``wsd``)."""
    min_lr_ratio: Annotated[float, SHARE] = 0.0
    """Last learning rate as a share of the peak."""
