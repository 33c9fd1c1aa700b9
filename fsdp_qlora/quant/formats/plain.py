"""The formats as plain transformers has them, through bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fsdp_qlora.config.schema import QuantSettings


def bitsandbytes_config(quant: QuantSettings, dtype: torch.dtype, offload_fp32: bool) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes stores the linears; None: as they are."""
    if quant.name == "none":
        return None
    common: dict[str, Any] = {"llm_int8_enable_fp32_cpu_offload": offload_fp32}
    if quant.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quant.llm_int8_threshold, **common)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant.name, bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype, **common,
    )  # fmt: skip
