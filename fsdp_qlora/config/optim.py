"""Settings of the groups ``optim`` and ``schedule``, which are part of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsdp_qlora.config import choices
from fsdp_qlora.config.auto import Auto
from fsdp_qlora.config.facts import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, YOUNGER, ReadBy

_ADEMAMIX = ReadBy(("ademamix_8bit",))
_IN_8_BITS = ReadBy(("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit"))


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer."""

    name: Annotated[str, choices.OPTIMIZERS] = "adamw"
    """AdamW, Lion, AdEMAMix, SGD with momentum, or Adafactor. ``_8bit``: bitsandbytes keeps the states in 8 bits.
    ``paged_``: states may move to host memory when the GPU is full; on a CPU there is nothing to page."""
    lr: Annotated[float | Auto, NOT_NEGATIVE] = "auto"
    """Peak learning rate. ``auto``, for AdamW: by the size and the family of the model and the scaling of the adapters
    (`fsdp_qlora.plan.recipe`); for the others, as in conf/optim. For Adafactor it is relative to each tensor: the step
    size is ``lr`` times the root mean square of the tensor's values, or times 0.001 if that is larger."""
    loraplus_lr_ratio: Annotated[float, NOT_NEGATIVE, YOUNGER] = 0.0
    """LoRA+: learning rate of the matrices B (and of vectors) over that of A, which is ``lr``; above 1, the paper finds
    about 16. Adapters of embeddings learn at 1e-6, as in PEFT. 0 = one learning rate for all."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight decay: decoupled, except for SGD, which adds it to the gradient. Biases and norms do not decay, as in
    transformers' ``Trainer``."""
    beta1: Annotated[float, BELOW_ONE] = 0.9
    """First-moment decay (AdamW, AdEMAMix), momentum (SGD), or share of the momentum in the update (Lion)."""
    beta2: Annotated[float, BELOW_ONE] = 0.999
    """Second-moment decay (AdamW, AdEMAMix), or decay of the momentum (Lion)."""
    beta3: Annotated[float, BELOW_ONE, _ADEMAMIX] = 0.9999
    """Decay of the slow first moment (AdEMAMix)."""
    alpha: Annotated[float, NOT_NEGATIVE, _ADEMAMIX] = 5.0
    """Weight of the slow first moment (AdEMAMix)."""
    t_alpha: Annotated[int, NOT_NEGATIVE, _ADEMAMIX] = 0
    """Steps over which ``alpha`` rises from 0 (AdEMAMix); 0 = no ramp."""
    t_beta3: Annotated[int, NOT_NEGATIVE, _ADEMAMIX] = 0
    """Steps over which ``beta3`` rises from ``beta1`` (AdEMAMix); 0 = no ramp."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """Term added to the square root of the second moment (AdamW, AdEMAMix)."""
    override_32bit: Annotated[list[str], _IN_8_BITS] = field(default_factory=list)
    """Patterns of parameters whose states an 8-bit optimizer keeps in 32 bits. Names are those in the adapter's file
    (``["*.layers.0.*", "*.q_proj.lora_B.*"]``). Tensors with fewer than 4,096 elements always keep 32-bit states."""

    @property
    def peak_lr(self) -> float:
        """The learning rate, once ``auto`` is settled."""
        if isinstance(self.lr, str):
            raise ValueError("optim.lr is auto: `fsdp_qlora.plan.recipe.choose_recipe` settles it.")
        return self.lr


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate schedule."""

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Decay to ``min_lr_ratio``: linear, cosine, none, or only at the end (``wsd``, warm-up-stable-decay)."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps of linear warm-up."""
    warmup_ratio: Annotated[float, BELOW_ONE] = 0.03
    """Warm-up as a share of all steps, when ``warmup_steps`` is 0."""
    decay_ratio: Annotated[float, SHARE] = 0.2
    """Share of all steps spent in the decay (``wsd``)."""
    min_lr_ratio: Annotated[float, SHARE] = 0.0
    """Final learning rate as a share of the peak."""
