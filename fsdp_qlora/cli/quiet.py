"""Hides upstream's notes about code paths that we do not use; warnings that concern the user stay."""

from __future__ import annotations

import logging
import os
import warnings

from fsdp_qlora.files.home import settle_without_home


def quieten() -> None:
    """Configure upstream's loggers and folders; call this before importing them."""
    settle_without_home(os.environ)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "failed to load CPU gemm_4bit": we dequantize instead
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # "parameters are on the meta device"
    # PEFT calls transformers by the old name; we use the one that every transformers 5 has
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # upstream's heads reshape their outputs; nothing here changes an output in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
