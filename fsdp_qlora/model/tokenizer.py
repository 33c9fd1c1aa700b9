"""A model folder's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fsdp_qlora.attention.blockwise import BLOCKWISE  # noqa: F401 - registers it
from fsdp_qlora.errors import ConfigError, ModelError, typed_line
from fsdp_qlora.files.read import own_file, parse_json
from fsdp_qlora.model.config import not_buildable, require_sane

CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates", "*/*.jinja")


def build_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``folder``.

    Raises:
        ModelError: if there is none that transformers can load.
        SecurityError: if one of its files links outside the folder: the tokenizer is copied into the adapter's folder.
    """
    _require_own_files(folder)
    require_sane(folder)  # for some tokenizers, transformers reads config.json too
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # odd settings surface only in use
    except Exception as error:  # a damaged tokenizer.json raises a plain Exception
        if "trust_remote_code" in str(error):
            raise not_buildable(folder, error) from error
        raise ModelError(f"model.name: {folder} has no usable tokenizer: {error}") from error
    return tokenizer


def stored_template(file: Path) -> str | None:
    """Return the chat template in a file: in Jinja, or in a ``tokenizer_config.json``, where other tools keep theirs.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8, or a config that is not JSON.
    """
    text = file.read_text(encoding="utf-8")
    if file.name != TOKENIZER_CONFIG:
        return text
    values = parse_json(text.encode())
    template = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(template, list):  # several with names, of which transformers takes this one
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def template_beside(adapter: Path) -> Path | None:
    """Return the file in an adapter's folder that holds its chat template (see `stored_template`); None if none does.

    Raises:
        ModelError: if its tokenizer's config cannot be read.
        SecurityError: if the file is a link out of the folder.
    """
    for name in (CHAT_TEMPLATE, TOKENIZER_CONFIG):
        file = own_file(adapter, name)
        try:
            if file.is_file() and stored_template(file) is not None:
                return file
        except (OSError, ValueError) as error:
            raise ModelError(f"adapter: {file} cannot be read: {error}.") from error
    return None


def _require_own_files(folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in folder.glob(pattern):
            own_file(folder, str(file.relative_to(folder)))


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add ``tokens``, which get the ids after those of the tokenizer.

    Raises:
        ConfigError: if the tokenizer already has one of them.
        ModelError: if its ids have gaps, so that the new ones are not the last ``len(tokens)`` of ``len(tokenizer)``.
    """
    if not tokens:
        return
    known = tokenizer.get_vocab()
    if there := [f"{token!r} (id {known[token]})" for token in tokens if token in known]:
        raise ConfigError(f"model.add_tokens: the tokenizer already has {', '.join(there)}; add only what it lacks.")
    first = len(tokenizer)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if ids != list(range(first, first + len(tokens))) or len(tokenizer) != first + len(tokens):
        raise ModelError(
            f"model.add_tokens: this tokenizer has {first} tokens, but gives new ones the ids {ids}: its ids have "
            "gaps, so plain transformers could not resize the model to it."
        )


def added_tokens(folder: Path, ids: Sequence[int]) -> list[str]:
    """Return the tokens that the tokenizer of an adapter's folder has under ``ids``.

    Raises:
        ModelError: if there is no tokenizer, or it has no such ids.
        SecurityError: if one of its files links outside the folder.
    """
    _require_own_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever it is, the tokens are not known
        raise ModelError(
            f"adapter: {folder} trains the rows of {len(ids)} tokens (trainable_token_indices), and only a tokenizer "
            f"beside it says which they are; transformers cannot load one from there ({typed_line(error)}). Copy the "
            "tokenizer that it was trained with into this folder."
        ) from error
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if odd := [token_id for token_id in ids if token_id not in names]:
        raise ModelError(f"adapter: {folder} trains the row of token {odd[0]}, which its tokenizer does not have.")
    return [names[token_id] for token_id in ids]
