"""Settings of the adapters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from fsdp_qlora.config import choices
from fsdp_qlora.config.facts import BELOW_ONE, MAY_CHANGE, POSITIVE, VERBATIM, YOUNGER

_START = re.compile(r"olora|loftq|pissa(_niter_[1-9]\d{0,5})?")


@dataclass(frozen=True)
class LoraSettings:
    """The trainable adapters."""

    variant: Annotated[str, choices.METHODS, *choices.STARTS, choices.NONE] = "lora"
    """Adapter method: LoRA, scaled by alpha/r (``lora``) or alpha/sqrt(r) (``rslora``), runs in our own layer;
    ``pissa``, ``olora`` and ``loftq`` are LoRA that starts from the base weights (``init_lora_weights``). The others
    run in PEFT's layers: slower, never compiled, but the same method and files as in PEFT. ``none`` trains the base
    itself, all of it."""
    use_rslora: Annotated[bool | None, YOUNGER] = None
    """Scale LoRA or DoRA by alpha/sqrt(r), as in PEFT; null: as the variant says."""
    use_dora: Annotated[bool | None, YOUNGER] = None
    """Train magnitudes beside LoRA's matrices (DoRA), as in PEFT; null: as the variant says."""
    init_lora_weights: Annotated[str | None, YOUNGER] = None
    """Initial values of LoRA's matrices: ``true`` (random A, zero B), ``pissa`` (principal singular vectors),
    ``pissa_niter_N`` (the same, approximated in N iterations), ``olora`` (orthonormal, by QR) or ``loftq`` (what
    quantization loses). The last four change the base as well, to what is left of it; null: as the variant says."""
    loftq_iter: Annotated[int, POSITIVE, YOUNGER] = 1
    """Alternations of LoftQ between quantizing and decomposing."""
    allow_large_svd: Annotated[bool, MAY_CHANGE] = False
    """Continue if ``pissa`` or ``loftq`` must decompose matrices whose smaller side is above 4,096: it takes long."""
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
    target_parameters: Annotated[Any, YOUNGER] = ""
    """Stacked expert weights that get adapters too: ``experts`` (all of them), or a list, named in the same ways
    (``[mlp.experts.down_proj]``). For ``lora`` and ``rslora``, without dropout. Routers get none."""
    exclude_modules: Annotated[list[str], YOUNGER] = field(default_factory=list)
    """Modules and stacked weights among them, named in the same ways, that get no adapter."""
    layers_to_transform: Annotated[list[int], YOUNGER] = field(default_factory=list)
    """Numbers of the decoder layers, from 0, that get adapters; empty = all."""
    rank_pattern: Annotated[dict[str, int], YOUNGER] = field(default_factory=dict)
    """Ranks of some targets, named in the same ways (``{v_proj: 32, "*.experts.*": 4}``); later patterns win. For
    LoRA's kinds only, as ``alpha_pattern``."""
    alpha_pattern: Annotated[dict[str, float], YOUNGER] = field(default_factory=dict)
    """Alphas of some targets, as ``rank_pattern``."""
    init_from: Annotated[str | None, VERBATIM, MAY_CHANGE] = None
    """PEFT adapter folder to start a new run from (same ranks, alphas and targets)."""

    @property
    def trains_base(self) -> bool:
        """Whether there are no adapters and the base itself is trained."""
        return self.variant == choices.NONE

    @property
    def method(self) -> str:
        """Name of the adapter method that computes: the variant, with PEFT's switches."""
        if self.variant not in choices.BUNDLES:
            return self.variant
        return "dora" if self.trains_magnitudes else "rslora" if self.scales_by_root else "lora"

    @property
    def scales_by_root(self) -> bool:
        """Whether LoRA is scaled by alpha/sqrt(r)."""
        return bool(self._switch("use_rslora"))

    @property
    def trains_magnitudes(self) -> bool:
        """Whether it is DoRA."""
        return bool(self._switch("use_dora"))

    @property
    def start(self) -> str | None:
        """How LoRA's matrices start from the base weights; None: they are random."""
        word = str(self._switch("init_lora_weights") or "true").lower()
        return None if word == "true" else word

    @property
    def start_is_known(self) -> bool:
        """Whether `start` is one there is."""
        return self.start is None or _START.fullmatch(self.start) is not None

    def _switch(self, key: str) -> bool | str | None:
        own = getattr(self, key)
        return choices.BUNDLES.get(self.variant, {}).get(key) if own is None else own
