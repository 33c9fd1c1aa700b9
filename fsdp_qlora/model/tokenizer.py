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
        ModelError: if it has none that transformers can load.
        SecurityError: if one of its files is a link to elsewhere: the adapter's folder gets a copy of the tokenizer.
    """
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            own_file(folder, str(file.relative_to(folder)))
    require_sane(folder)  # which transformers reads for some tokenizers, too
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # odd settings show when it is used
    except Exception as error:  # of no special kind where tokenizer.json is damaged
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable tokenizer: {error}") from error
    return tokenizer
