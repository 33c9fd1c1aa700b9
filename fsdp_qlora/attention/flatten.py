"""What the decoder is given with the tokens: positions, and for varlen attention where each row begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import is_flash_attention_requested

from fsdp_qlora.attention.varlen import VARLEN
from fsdp_qlora.data.labels import Sequences


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
