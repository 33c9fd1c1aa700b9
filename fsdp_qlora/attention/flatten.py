"""The decoder's inputs besides tokens: positions and, for varlen attention, the boundaries of each row."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import is_flash_attention_requested

from fsdp_qlora.attention.varlen import VARLEN
from fsdp_qlora.data.labels import Sequences


def reads_boundaries(attention: str) -> bool:
    """Whether an attention implementation separates the rows within a flat row by their boundaries.

    Flash attention (from the package or the hub) and our own `varlen` do. All others read positions and make a dense
    mask.
    """
    return attention == VARLEN or is_flash_attention_requested(requested_attention_implementation=attention)


def decoder_inputs(
    input_ids: torch.Tensor, position_ids: torch.Tensor | None, sequences: Sequences | None
) -> dict[str, Any]:
    """Return the decoder's arguments.

    Flash attention needs all four boundaries and lengths, and no mask. Otherwise transformers derives them from the
    positions in every layer, which synchronises with the device and works for a single row only.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if sequences is not None:
        boundaries, longest = sequences.boundaries, sequences.max_length
        inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    return inputs
