"""Keep upstream's notes about paths we do not take off the screen; warnings that concern a person stay."""

from __future__ import annotations

import logging
import os
import warnings

from fsdp_qlora.files.home import settle_without_home


def quieten() -> None:
    """Set upstream's loggers and places; call before importing them."""
    settle_without_home(os.environ)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "failed to load CPU gemm_4bit": we dequantize instead
    # PEFT asks transformers by the old name; ours is the one that every transformers 5 has
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
