"""The names of tensors in adapter files of older PEFT versions and of other tools, and the names that PEFT gives them.

What only spells a name differently is read under PEFT's name. What stores other numbers under such a name (a transposed
layout) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.adapters.method import shared_names
from fsdp_qlora.adapters.names import LORA_A, LORA_B
from fsdp_qlora.errors import ModelError

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"\.lora_([AaBb])(?:\.(?!weight$)[^.]+)?\.weight$")
"""A LoRA matrix, perhaps with its adapter's name (``lora_A.default.weight``) or in another case."""
_TRANSPOSED = re.compile(r"\.lora_[ab]$")
"""MLX's names: A is ``[in_features, r]`` there."""


_TABLE = ".base_layer.weight"
"""What PEFT calls the base's own table under an adapter on the embedding or the head, which it saves beside it
(``save_embedding_layers``)."""


def as_peft_spells(name: str) -> str:
    """Return PEFT's name of a tensor, or ``name`` itself where that is not known."""
    if (match := _MATRIX.search(name)) is None:
        return name
    module = name[: match.start()].replace("_orig_mod.", "").removeprefix("module.")
    module = module if module.startswith(_PREFIX) else _PREFIX + module.removeprefix("base_model.")
    return module + (LORA_A if match[1] in "Aa" else LORA_B)


def spelt(names: Iterable[str], file: Path) -> dict[str, str]:
    """Return PEFT's name -> name in the file.

    Raises:
        ModelError: if two tensors have the same name in PEFT, or a name is of a transposed layout.
    """
    stored: dict[str, str] = {}
    for name in names:
        if _TRANSPOSED.search(name):
            raise ModelError(
                f"adapter: {file} is of another tool: {name} is a transposed matrix (as MLX stores it), which PEFT "
                "does not read. Convert it to PEFT's format with that tool."
            )
        if (other := stored.setdefault(as_peft_spells(name), name)) != name:
            raise ModelError(f"adapter: {file} holds {other} and {name}, which are one tensor in PEFT.")
    return stored


class SpeltFile:
    """An opened safetensors file whose tensors have PEFT's names.

    `keys` leaves out what PEFT saves beside an adapter: the shared bases of RandLoRA, repeated in each layer
    (`require_equal_copies`), and the base's embedding or head below an adapter on it (`tables`).
    """

    def __init__(self, opened: Any, file: Path) -> None:
        """Read the names.

        Raises:
            ModelError: as `spelt`.
        """
        self._opened, self._file = opened, file
        self._stored = spelt(opened.keys(), file)
        shared = {name.rpartition(".")[2]: name for name in shared_names() & self._stored.keys()}
        self._copies = {
            name: shared[last]
            for name in self._stored
            if (last := name.rpartition(".")[2]) in shared and name != shared[last]
        }
        adapted = {name.rpartition(".lora_")[0] for name in self._stored if ".lora_" in name}
        self.tables = [x for x in self._stored if x.endswith(_TABLE) and x.removesuffix(_TABLE) in adapted]
        """Names of the base's own tables in the file."""

    def keys(self) -> list[str]:
        """Return the names, as PEFT spells them."""
        return [name for name in self._stored if name not in self._copies and name not in self.tables]

    def require_equal_copies(self) -> None:
        """Check that each copy of a shared tensor equals it: PEFT's layers share the one, whichever was read last.

        Raises:
            ModelError: if one differs.
        """
        for name, shared in self._copies.items():
            if not torch.equal(self.get_tensor(name), self.get_tensor(shared)):
                raise ModelError(
                    f"adapter: {self._file}: {name} differs from {shared}, of which it is a copy; the file is damaged, "
                    "or made of several."
                )

    def get_tensor(self, name: str) -> Any:
        """Return a tensor."""
        return self._opened.get_tensor(self._stored.get(name, name))

    def get_slice(self, name: str) -> Any:
        """Return a tensor's shape and parts."""
        return self._opened.get_slice(self._stored.get(name, name))

    def metadata(self) -> Mapping[str, str]:
        """Return the texts in the file's header."""
        return self._opened.metadata() or {}


def in_model(name: str, known: Iterable[str]) -> str:
    """Return the only name in ``known`` that ``name`` is the end of, where a tool left out ``model.`` in front.

    Or ``name``, if there is none or several.
    """
    ends = [one for one in known if one.endswith("." + name.removeprefix(_PREFIX))]
    return ends[0] if len(ends) == 1 else name
