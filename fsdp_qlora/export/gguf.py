"""GGUF files that llama.cpp's converters wrote: re-opened with the reader of the package gguf, and compared.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fsdp_qlora.errors import ModelError, NumericsError
from fsdp_qlora.export.gguf_source import Vocabulary
from fsdp_qlora.shapes.linears import ModelShapes

if TYPE_CHECKING:
    from gguf import GGUFReader

_NOT_TRAINED = ("rope_freqs.", "rope_factors_")
"""Beginnings of names of tensors that the converter computes from the config."""
_HEAD = "output.weight"
_TABLE = "token_embd.weight"
_TEMPLATE = "tokenizer.chat_template"
_END, _ADDS_BEGIN, _ADDS_END = (f"tokenizer.ggml.{key}" for key in ("eos_token_id", "add_bos_token", "add_eos_token"))


class GgufFile:
    """A GGUF file, mapped into memory."""

    def __init__(self, file: Path, may_write: bool = False) -> None:
        """Read its header.

        Raises:
            NumericsError: if it is no whole GGUF file.
        """
        from gguf import GGUFReader

        self.file = file
        try:
            self._reader: GGUFReader = GGUFReader(file, "r+" if may_write else "r")
        except (ValueError, IndexError, KeyError) as error:  # whatever numpy says of a file that is cut off
            raise NumericsError(f"{file} is no whole GGUF file: {error}") from error
        self.shapes = {t.name: tuple(int(size) for size in reversed(t.shape)) for t in self._reader.tensors}
        """Shape of each tensor, by llama.cpp's name, slowest dimension first as in safetensors."""

    def value(self, key: str) -> Any:
        """Return a value of the header; None if it has none of this key."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def set_number(self, key: str, value: int) -> None:
        """Overwrite a number or truth value that the header has.

        Raises:
            NumericsError: if it has none of this key.
        """
        field = self._reader.get_field(key)
        if field is None:
            raise NumericsError(f"{self.file} has no {key}.")
        field.parts[field.data[0]][0] = value
        self._reader.data.flush()  # type: ignore[attr-defined]  (a memory map)

    def require_finite(self) -> None:
        """Check the tensors that are stored in 16 bits with a small range.

        Raises:
            NumericsError: naming the first that holds a value beyond it.
        """
        for tensor in self._reader.tensors:
            if tensor.tensor_type.name == "F16" and not bool(np.isfinite(tensor.data).all()):
                raise NumericsError(
                    f"export.gguf_type: {tensor.name} holds values that do not fit f16; set export.gguf_type=bf16."
                )


def settle_tokens(file: Path, vocabulary: Vocabulary) -> None:
    """Let programs begin and end a text as in training, whatever the converter took from the tokenizer's files."""
    written = GgufFile(file, may_write=True)
    if written.value(_ADDS_BEGIN) is not None:
        written.set_number(_ADDS_BEGIN, vocabulary.adds_begin)
    if written.value(_ADDS_END) is not None and vocabulary.template is not None:
        written.set_number(_ADDS_END, False)
    if vocabulary.end is not None and written.value(_END) is not None:
        written.set_number(_END, vocabulary.end)


def verify_model(file: Path, shapes: ModelShapes, vocabulary: Vocabulary) -> int:
    """Compare a model's file with the model it was made of; return its number of tensors.

    Raises:
        NumericsError: if tensors, vocabulary, special tokens or chat template are not the model's.
    """
    written = GgufFile(file)
    _compare_tensors(written, shapes)
    rows, tokens = shapes.embedding_rows, written.value("tokenizer.ggml.tokens") or []
    if len(tokens) != rows or written.shapes.get(_TABLE, (0,))[0] != rows:
        raise NumericsError(
            f"{file} has {len(tokens)} tokens and {written.shapes.get(_TABLE, (0,))[0]} rows of {_TABLE}; the model "
            f"has {rows}."
        )
    whole = written.value("tokenizer.ggml.model") == "gpt2"  # others are spelt in another way
    for token_id, spellings in sorted(vocabulary.tokens.items()):
        if (whole or token_id in vocabulary.special) and tokens[token_id] not in spellings:
            raise NumericsError(
                f"{file}: token {token_id} is {tokens[token_id]!r}, and the tokenizer's {spellings[0]!r}."
            )
    expected = {_ADDS_BEGIN: vocabulary.adds_begin, _END: vocabulary.end, _TEMPLATE: vocabulary.template}
    for key, value in expected.items():
        there = written.value(key)
        if key == _ADDS_BEGIN and there is None:  # what llama.cpp does then
            there = written.value("tokenizer.ggml.model") == "llama"
        if value is not None and there != value:
            said = (
                "another one than the tokenizer's" if key == _TEMPLATE else f"{there}, and the tokenizer's is {value}"
            )
            raise NumericsError(f"{file}: {key} is {said}.")
    written.require_finite()
    return len(written.shapes)


def _compare_tensors(written: GgufFile, shapes: ModelShapes) -> None:
    """Check that all weights are there, and those that llama.cpp knows by name in their shapes."""
    called_there = _names(written, len(shapes.layers))
    missing: list[str] = []
    for name, shape in shapes.parameters.items():
        called = called_there(name)
        if called is None:
            continue
        if called not in written.shapes:
            missing.append(f"{name} ({called})")
        elif sorted(written.shapes[called]) != sorted(shape):  # some are transposed
            stored = list(written.shapes[called])
            raise NumericsError(f"{written.file}: {called} is {stored}, and the model's {name} is {list(shape)}.")
    apart = {_HEAD} if shapes.tied else set()  # a copy of the embedding
    there = sum(
        prod(shape) for name, shape in written.shapes.items() if name not in apart and not name.startswith(_NOT_TRAINED)
    )
    expected = sum(prod(shape) for shape in shapes.parameters.values())
    if there < expected:
        raise NumericsError(
            f"{written.file} holds {there:,} weights, and the model {expected:,}; "
            f"missing: {missing[0] if missing else 'not known by name'}."
        )
    if not shapes.tied and _HEAD not in written.shapes:
        raise NumericsError(
            f"{written.file} has no {_HEAD}, so its head would be the embedding, and the model's is not."
        )


def _names(written: GgufFile, num_layers: int) -> Callable[[str], str | None]:
    """Return what llama.cpp calls a parameter of a model, as far as the package gguf knows it."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    by_name = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    architecture = by_name.get(written.value("general.architecture"))
    if architecture is None:  # younger than the package
        return lambda name: None
    known = get_tensor_name_map(architecture, num_layers)
    return lambda name: known.get_name(name, try_suffixes=(".weight", ".bias"))


def verify_adapter(
    file: Path, pairs: Mapping[str, tuple[int, int, int]], alpha: float, base: Path | None
) -> int:  # fmt: skip
    """Compare an adapter's file with the adapter it was made of, and with its base's file if there is one.

    Args:
        file: the adapter in GGUF.
        pairs: for each adapted linear, its inputs, rank and outputs.
        alpha: LoRA's alpha.
        base: the base model in GGUF.

    Returns:
        The number of its tensors.

    Raises:
        NumericsError: if the file is not this adapter.
        ModelError: if it does not fit the base.
    """
    written = GgufFile(file)
    facts = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    for key, value in facts.items():
        if written.value(key) != value:
            raise NumericsError(f"{file}: {key} is {written.value(key)!r}, and should be {value!r}.")
    ends = {"a": ".lora_a", "b": ".lora_b"}
    adapted = sorted(name.removesuffix(ends["a"]) for name in written.shapes if name.endswith(ends["a"]))
    there = [(*reversed(written.shapes[name + ends["a"]]), written.shapes[name + ends["b"]][0]) for name in adapted]
    if len(written.shapes) != 2 * len(pairs) or sorted(there) != sorted(pairs.values()):
        raise NumericsError(
            f"{file} holds {len(adapted)} pairs of matrices that are not those of the adapter's {len(pairs)}."
        )
    written.require_finite()
    if base is not None:
        model = GgufFile(base)
        for name, (inputs, _, outputs) in zip(adapted, there, strict=True):
            if model.shapes.get(name) != (outputs, inputs):
                has = list(model.shapes[name]) if name in model.shapes else "none"
                raise ModelError(
                    f"export.gguf_base: {base} does not fit the adapter's {name} [{outputs}, {inputs}]: it has {has}."
                )
    return len(written.shapes)
