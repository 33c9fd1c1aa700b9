"""A model folder's tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fsdp_qlora.attention.blockwise import BLOCKWISE  # noqa: F401 - registers it
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.model.config import not_buildable, require_sane

_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates", "*/*.jinja")


def build_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``folder``.

    Raises:
        ModelError: if there is none that transformers can load.
        SecurityError: if one of its files links outside the folder: the tokenizer is copied into the adapter's folder.
    """
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            own_file(folder, str(file.relative_to(folder)))
    require_sane(folder)  # for some tokenizers, transformers reads config.json too
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # odd settings surface only in use
    except Exception as error:  # a damaged tokenizer.json raises a plain Exception
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable tokenizer: {error}") from error
    return tokenizer
