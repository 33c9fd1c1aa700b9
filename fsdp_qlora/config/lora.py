"""Settings of the adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from fsdp_qlora.config import choices
from fsdp_qlora.config.facts import BELOW_ONE, MAY_CHANGE, POSITIVE, VERBATIM, YOUNGER


@dataclass(frozen=True)
class LoraSettings:
    """The trainable adapters."""

    variant: Annotated[str, choices.METHODS, choices.NONE] = "lora"
    """Adapter method: LoRA, scaled by alpha/r (``lora``) or alpha/sqrt(r) (``rslora``), runs in our own layer. The
    others run in PEFT's layers: slower, never compiled, but the same method and files as in PEFT. ``none`` trains the
    base itself, all of it."""
    r: Annotated[int, POSITIVE] = 16
    """Adapter rank. ``ia3``, ``oft``, ``road``, ``c3a`` and ``fourierft`` have none."""
    alpha: Annotated[float, POSITIVE] = 32.0
    """Numerator of the scaling factor (``lora``, ``rslora``, ``dora``, ``loha``, ``lokr`` and ``randlora``)."""
    dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout of the adapter's input; masks depend on seed, step and micro-batch, never on the rank."""
    options: Annotated[dict[str, Any], YOUNGER] = field(default_factory=dict)
    """A method's own settings, named as in PEFT's config (``oft_block_size``, ``n_frequency``, ``group_size``, ...);
    PEFT's defaults apply to the others."""
    target_modules: Any = "all-linear"
    """``all-linear``, or a list of modules: a name, its last parts (``[q_proj, v_proj]``), or a pattern of the whole
    name (``model.layers.1?.mlp.*``)."""
    exclude_modules: Annotated[list[str], YOUNGER] = field(default_factory=list)
    """Modules among them, named in the same ways, that get no adapter."""
    layers_to_transform: Annotated[list[int], YOUNGER] = field(default_factory=list)
    """Numbers of the decoder layers, from 0, that get adapters; empty = all."""
    rank_pattern: Annotated[dict[str, int], YOUNGER] = field(default_factory=dict)
    """Ranks of some modules, named in the same ways (``{v_proj: 32}``); later patterns win. For LoRA's kinds only, as
    ``alpha_pattern``."""
    alpha_pattern: Annotated[dict[str, float], YOUNGER] = field(default_factory=dict)
    """Alphas of some modules, as ``rank_pattern``."""
    init_from: Annotated[str | None, VERBATIM, MAY_CHANGE] = None
    """PEFT adapter folder to start a new run from (same ranks, alphas and targets)."""

    @property
    def trains_base(self) -> bool:
        """Whether there are no adapters and the base itself is trained."""
        return self.variant == choices.NONE
