"""What llama.cpp's converter is given: a model's folder, checked for what it would get wrong without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.model_folder import beside_the_weights
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.files.write import copy_regular, write_json
from fsdp_qlora.load.conversions import arrangement
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.shapes.linears import ModelShapes


@dataclass(frozen=True)
class Vocabulary:
    """What a file must say of the tokens."""

    tokens: Mapping[int, tuple[str, ...]]
    """Each token of the tokenizer, as it may be spelt."""
    special: frozenset[int]
    """Ids of tokens that are no text."""
    adds_begin: bool
    """Whether programs are to add the first token to a text: the tokenizer does, and conversations begin with it."""
    tokenizer_adds: bool
    """Whether the tokenizer adds it."""
    end: int | None
    """The token that ends an answer."""
    template: str | None
    """The chat template in Jinja."""


def link_model(source: Path, folder: Path, beside: Mapping[str, Path], trust_remote_code: bool) -> None:
    """Make ``folder`` one with the weights of ``source``, as links, and copies of what lies beside them.

    The converter lets transformers run a tokenizer's code; without ``trust_remote_code``, it does not get any.

    Args:
        source: a model's folder.
        folder: an empty folder.
        beside: files that replace those of ``source``, by name.
        trust_remote_code: whether Python code is copied.

    Raises:
        SecurityError: if a file of the model is a link out of its folder.
    """
    for name, file in {**beside_the_weights(source), **beside}.items():
        if trust_remote_code or not name.endswith(".py"):
            copy_regular(file, folder / name)
    for file in source.glob("*.safetensors.index.json"):
        copy_regular(own_file(source, file.name), folder / file.name)
    for file in source.glob("*.safetensors"):
        (folder / file.name).symlink_to(own_file(source, file.name))


def drop_code(folder: Path) -> None:
    """Remove Python code from a model's folder, and the settings that name it."""
    for file in folder.glob("*.py"):
        file.unlink()
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and "auto_map" in (values := read_json(file, dict[str, Any])):
            write_json(file, {key: value for key, value in values.items() if key != "auto_map"})


def state_begin(folder: Path) -> None:
    """Write into the tokenizer's config that it adds a first token, so that the file's header says so in any case."""
    file = folder / "tokenizer_config.json"
    values = read_json(file, dict[str, Any]) if file.is_file() else {}
    write_json(file, values | {"add_bos_token": True})


def check_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelShapes:
    """Check that a model's files agree with its config and tokenizer.

    Args:
        folder: the model's folder.
        model: the model on meta.
        tokenizer: its tokenizer.

    Raises:
        ModelError: if the weights are quantized, the tokenizer has tokens without a row, the stored embedding has
            another size than the config says, or the config ties a head to it that is stored apart and differs.
    """
    what = "what=gguf:"
    shapes = read_shapes(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{what} {folder} is stored quantized; name the 16-bit model (model.name).")
    files = SafetensorsFolder(folder)
    files.arrange(arrangement(model, files.entries))
    rows = shapes.embedding_rows
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ModelError(f"{what} the tokenizer of {folder} has ids up to {last}, and its embedding {rows} rows.")
    table, head = f"{shapes.embedding}.weight", f"{shapes.head}.weight"
    files.find(table, shapes.parameters[table])
    if not shapes.tied:
        files.find(head, shapes.parameters[head])
    elif files.has(head) and files.has(table) and not files.looks_equal(head, table):
        raise ModelError(
            f"{what} {folder}: its config ties the head to the embedding (tie_word_embeddings), but {head} is stored "
            "apart and differs; set tie_word_embeddings to false in its config.json, or remove it from the files."
        )
    return shapes


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, end: int | None, begins: bool | None) -> Vocabulary:
    """Read from a tokenizer what a file must say.

    Args:
        tokenizer: the tokenizer.
        end: the token that ends an answer.
        begins: whether the text of a conversation begins with the tokenizer's first token; None without a template.
    """
    added = tokenizer.added_tokens_decoder
    tokens: dict[int, tuple[str, ...]] = {}
    for token, token_id in tokenizer.get_vocab().items():
        spellings = [token]
        if token_id in added:  # the converter writes what such a token is decoded to
            spellings.append(str(tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))))
            spellings += [spelling.replace("\u2581", " ") for spelling in spellings]
        tokens[token_id] = tuple(dict.fromkeys(spellings))
    ids = tokenizer("a")["input_ids"]
    adds = tokenizer.bos_token_id is not None and list(ids)[:1] == [tokenizer.bos_token_id]  # type: ignore[arg-type]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    special = frozenset(tokenizer.all_special_ids)
    return Vocabulary(tokens, special, adds and begins is not False, adds, end, template)
