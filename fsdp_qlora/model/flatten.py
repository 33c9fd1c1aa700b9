"""What the decoder is given with the tokens: positions, and for varlen attention where each row begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import is_flash_attention_requested

from fsdp_qlora.model.varlen import VARLEN
from fsdp_qlora.plan.batch import Sequences


def reads_boundaries(attention: str) -> bool:
    """Return whether an attention implementation keeps the rows of one flat row apart by their boundaries.

    That is flash attention (of the package or from the hub) and our own `varlen`. All others read positions and make a
    dense mask.
    """
    return attention == VARLEN or is_flash_attention_requested(requested_attention_implementation=attention)


def decoder_inputs(
    input_ids: torch.Tensor, position_ids: torch.Tensor | None, sequences: Sequences | None
) -> dict[str, Any]:
    """Return the decoder's arguments.

    Flash attention wants all four of boundaries and lengths, and no mask. With fewer transformers looks at the
    positions in every layer, which waits for the device, and at one row only.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if sequences is not None:
        boundaries, longest = sequences.boundaries, sequences.max_length
        inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs


def why_not(attention: str, device: torch.device, dtype: torch.dtype, text_config: Any) -> str | None:
    """Return why an attention that `reads_boundaries` cannot be had, and what to do; None where nothing speaks against.

    What only a forward shows is not seen.
    """
    if not reads_boundaries(attention):
        return None
    on_cpu = attention == VARLEN and device.type == "cpu"
    if dtype not in (torch.bfloat16, torch.float16) and not on_cpu:
        return f"{attention} computes in 16 bits only; choose sdpa or eager, or precision=bf16"
    if attention != VARLEN:
        return None
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        return "varlen has no chunked_attention, which this model needs; choose sdpa or eager"
    if any(getattr(text_config, key, None) for key in ("attention_dropout", "attn_pdrop")):
        return "varlen has no attention dropout, which this model needs; choose sdpa or eager"
    capped = any(getattr(text_config, key, None) for key in ("attn_logit_softcapping", "attention_logit_cap"))
    return "varlen has no soft cap on a GPU, which this model needs; choose eager" if capped and not on_cpu else None
