"""Chooses the attention implementations to try for a model: those that its class claims to support, fastest first.

A class's flags are a claim, not a proof: a class with its own attention code may ignore the setting and apply no causal
mask at all. So ``auto`` is a list of candidates, and the check at the start takes the first that computes the same as
upstream's eager attention (`fsdp_qlora.checks.twin`). A plan, which runs nothing, takes the first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.import_utils import is_flash_attn_2_available, is_kernels_available

from fsdp_qlora.attention.blockwise import BLOCKWISE
from fsdp_qlora.attention.flatten import reads_boundaries
from fsdp_qlora.attention.varlen import VARLEN
from fsdp_qlora.distributed.process import has_cuda_kernels, nvidia_level
from fsdp_qlora.errors import ModelError

EAGER, _FLASH, _FLEX = "eager", "flash_attention_2", "flex_attention"
_NOT_ON_CPU = {_FLASH: "needs a GPU", _FLEX: "has no backward on CPUs"}
_FLASH_CAPABILITY = (8, 0)
"""What FlashAttention 2 needs of NVIDIA's cards: Ampere."""
_CAPS, _DROPOUTS = ("attn_logit_softcapping", "attention_logit_cap"), ("attention_dropout", "attn_pdrop")
"""Config keys for soft caps on scores, and for attention dropout."""


def attention_candidates(
    device: torch.device, asked: str | None, model_config: Any, dtype: torch.dtype, trust_remote_code: bool = False,
    auto_class: str | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Return the attention implementations to try, in order, or only ``asked`` if it is given.

    These are flash attention (in 16 bits, if the package is installed) and sdpa on an accelerator, and `blockwise` on a
    CPU, each only if the class claims to support it and it supports the config. Eager always comes last. Models that
    another ``auto_class`` builds than that of causal language models get eager on a CPU, and sdpa before it on an
    accelerator.

    Raises:
        ModelError: if ``asked`` is not available on this device or in this dtype, or would download compiled code that
            is not trusted.
    """
    text, kind = model_config.get_text_config(), _model_class(model_config) if auto_class is None else None
    if asked is not None:
        if (why := why_not(asked, device, dtype, text)) is not None:
            raise ModelError(f"model.attn_implementation: {why}.")
        if asked == _FLASH and not trust_remote_code and (why := _from_hub(kind)) is not None:
            raise ModelError(
                f"model.attn_implementation: {asked} would download compiled code from the hub and run it: {why}. "
                "Choose sdpa, install flash-attn, or set model.trust_remote_code=true if you trust that code."
            )
        return (asked,)
    if kind is None:  # an encoder, an encoder-decoder, or the folder's own code
        return (EAGER,) if device.type == "cpu" or not _has_sdpa(model_config, auto_class) else ("sdpa", EAGER)
    capped, candidates = _has(text, _CAPS), []
    if device.type == "cpu":
        if kind._supports_attention_backend and not capped and not _has(text, _DROPOUTS):
            candidates.append(BLOCKWISE)
    else:
        if kind._supports_flash_attn and is_flash_attn_2_available() and dtype.itemsize == 2 and not capped:
            candidates += [] if _from_hub(kind) else [_FLASH]
        if kind._supports_sdpa and not capped:
            candidates.append("sdpa")
    return (*candidates, EAGER)


def _from_hub(kind: Any) -> str | None:
    """Return why transformers would load flash attention for a class from the hub; None if it would not.

    If the package ``kernels`` is installed, a model's constructor does so without asking.
    """
    if not is_kernels_available():
        return None
    theirs = getattr(kind, "_compatible_flash_implementations", None)
    if theirs is not None and _FLASH not in theirs:
        return f"{kind.__name__} uses {theirs[0]}"
    return None if is_flash_attn_2_available() else "flash-attn is not installed, but kernels is"


def why_not(attention: str, device: torch.device, dtype: torch.dtype, text_config: Any) -> str | None:
    """Return why an attention is not available, and what to do; None if it seems available.

    Problems that show only in a forward are not detected.
    """
    if device.type == "cpu" and (why := _NOT_ON_CPU.get(attention)) is not None:
        return f"{attention} {why}, and this run is on a CPU; choose {BLOCKWISE}, varlen, sdpa or eager"
    if not reads_boundaries(attention):
        return None
    on_cpu = attention == VARLEN and device.type == "cpu"
    if dtype not in (torch.bfloat16, torch.float16) and not on_cpu:
        return f"{attention} supports 16-bit dtypes only; choose sdpa or eager, or precision=bf16"
    if attention == _FLASH and not is_flash_attn_2_available() and not is_kernels_available():
        return f"{attention} needs a GPU and the package flash-attn; one of them is missing, choose varlen or sdpa"
    return (_lacking_for_varlen(device) or _lacking_in_varlen(text_config, on_cpu)) if attention == VARLEN else None


def _lacking_for_varlen(device: torch.device) -> str | None:
    """Return why torch's kernel (FlashAttention 2) does not run on this device; a planned one may be absent."""
    if device.type == "cpu":
        return None
    if not has_cuda_kernels(device):
        return f"varlen runs on CPUs and on NVIDIA's and AMD's GPUs, and this run is on {device.type}; choose sdpa"
    level = nvidia_level(device)
    if level is None or level >= _FLASH_CAPABILITY:
        return None
    return f"varlen needs compute capability 8.0, and this GPU has {level[0]}.{level[1]}; choose sdpa"


def _lacking_in_varlen(text_config: Any, on_cpu: bool) -> str | None:
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        return "varlen does not support chunked_attention, which this model needs; choose sdpa or eager"
    if _has(text_config, _DROPOUTS):
        return "varlen does not support attention dropout, which this model needs; choose sdpa or eager"
    if _has(text_config, _CAPS) and not on_cpu:
        return "varlen does not support soft caps on a GPU, which this model needs; choose eager"
    return None


def _has(text_config: Any, keys: tuple[str, ...]) -> bool:
    return any(getattr(text_config, key, None) for key in keys)


def code_files(model_config: Any, folder: Path, trust_remote_code: bool) -> list[Path]:
    """Return the files that hold the model's own code: upstream's module, and the folder's if trusted."""
    own = sorted(folder.glob("*.py")) if trust_remote_code and folder.is_dir() else []
    kind = _model_class(model_config)
    module = sys.modules.get(kind.__module__) if kind is not None else None
    return [*own, Path(module.__file__)] if module is not None and module.__file__ else own


def _has_sdpa(model_config: Any, auto_class: str | None) -> bool:
    """Whether the class that ``auto_class`` builds supports sdpa; those that are not upstream's may."""
    if auto_class is None:
        return True
    kinds = getattr(transformers, auto_class)._model_mapping
    kind = kinds.get(type(model_config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    return kind is None or kind._supports_sdpa


def _model_class(model_config: Any) -> Any:
    """Return transformers' causal language model class for this config; None if there is none."""
    if getattr(model_config, "is_encoder_decoder", False) or type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    names = getattr(model_config, "architectures", None) or [""]
    return None if names[0].endswith("ForMaskedLM") else MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
