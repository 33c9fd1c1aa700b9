"""A fingerprint of a base model and of how it is stored, small enough for the header of an adapter's file.

It samples up to 16 tensors of the decoder layers and up to 16 others: a digest of the first values as they are stored,
and for what is quantized a digest of the first row of codes, which a file in 4 bits holds as well. So the same weights
are told from others even where one side has only their 4-bit form. Plain PEFT reads past the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

from fsdp_qlora.config.schema import BLOCK_SIZES
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stored import packed_format
from fsdp_qlora.quant.formats import Format, Packed, build_format, dequantize, one_thread, quantize
from fsdp_qlora.quant.packing import bytes_to_rows
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes

KEY = "fsdp_qlora.base"
"""The fingerprint's key in a safetensors header."""
_TENSORS, _VALUES = 16, 16384
_MAX_BYTES = 1 << 20

Facts = dict[str, Any]
"""A fingerprint as JSON: ``sizes``, ``values`` (name -> dtype and digest), ``codes`` (name -> format and digest)."""


@dataclass(frozen=True)
class Base:
    """A base model's files, and how they are stored in memory."""

    source: SafetensorsFolder
    shapes: ModelShapes
    quantized: Sequence[Packed]

    def fingerprint(self) -> Facts:
        """Read the samples.

        Raises:
            ModelError: if a tensor cannot be read.
        """
        shapes, formats = self.shapes, {x.linear.name: x.quant_format for x in self.quantized}
        linears = _spread([x for x in shapes.linears if self._readable(x.parameter)])
        names = {x.parameter for x in shapes.linears}
        others = _spread([name for name in shapes.parameters if name not in names and self._readable(name)])
        values = {name: self._values(name, shapes.parameters[name]) for name in others}
        codes: dict[str, list[Any]] = {}
        for linear in linears:
            if packed_format(self.source, linear.parameter) is None:
                values[linear.parameter] = self._values(linear.parameter, linear.stored_shape)
            if not linear.transposed:
                kind = formats.get(linear.name)
                codes[linear.parameter] = (
                    [None, ""] if kind is None else [list(_words(kind)), self._codes(linear, kind)]
                )
        sizes = {
            "vocabulary": shapes.embedding_rows, "hidden size": shapes.hidden_size, "decoder layers": len(shapes.layers)
        }  # fmt: skip
        return {"sizes": sizes, "values": values, "codes": codes}

    def _readable(self, name: str) -> bool:
        """Whether the files hold a tensor as it is: converting one would read it whole."""
        return name in self.source.entries or name in self.source.arranged

    def _values(self, name: str, shape: tuple[int, ...]) -> str:
        """Return the dtype in the files, and a digest of the shape and the first values."""
        stored = self.source.find(name, shape)
        first = self.source.read(stored, 0, min(stored.numel, _VALUES))
        return f"{stored.parts[0].dtype} {_digest(first, shape)}"

    def _codes(self, linear: LinearShape, kind: Format) -> str:
        """Return a digest of the first row of codes."""
        each = min(kind.row_weights(linear.in_features), linear.numel_each)
        if packed_format(self.source, linear.parameter) is not None:
            entry = self.source.entries[linear.parameter]
            row = bytes_to_rows(self.source.read_bytes(entry, 0, min((each + 1) // 2, entry.num_bytes)), 1)
        else:
            stored = self.source.find(linear.parameter, linear.stored_shape)
            row = kind.pack(kind.quantize_run(self.source.read(stored, 0, each), linear.in_features)[0], 1)
        return _digest(row, linear.stored_shape)

    def difference(self, theirs: Facts) -> float | None:
        """Return how far the sampled weights are from those of a base in the formats of ``theirs``, relative to them.

        A root mean square over rows of the linears in both samples; None if the files hold no values to round again.
        """
        ours, whole, off = {x.linear.parameter: x.quant_format for x in self.quantized}, 0.0, 0.0
        by_name = {x.parameter: x for x in self.shapes.linears}
        with one_thread():
            for name, (kind, _) in theirs["codes"].items():
                linear = by_name.get(name)
                if linear is None or packed_format(self.source, linear.parameter) is not None:
                    continue
                stored = self.source.find(linear.parameter, linear.stored_shape)
                rows = min(linear.out_features, max(1, _VALUES // linear.in_features))
                weight = self.source.read(stored, 0, rows * linear.in_features).float().view(rows, -1)
                here = _rounded(weight, ours.get(name))
                there = _rounded(weight, None if kind is None else build_format(*kind))
                whole += float(weight.square().sum())
                off += float((here - there).square().sum())
        return sqrt(off / whole) if whole else None


def _rounded(weight: torch.Tensor, kind: Format | None) -> torch.Tensor:
    return weight if kind is None else dequantize(quantize(weight, kind), kind, tuple(weight.shape), torch.float32)


def _words(kind: Format) -> tuple[str, bool, int]:
    """Return what `build_format` makes the format of."""
    return kind.name, kind.double_quant, kind.block_size


def _spread(items: Sequence[Any]) -> list[Any]:
    """Return at most 16 of ``items``, evenly spread."""
    count = min(len(items), _TENSORS)
    return [items[i * len(items) // count] for i in range(count)]


def _digest(values: torch.Tensor, shape: Sequence[int]) -> str:
    raw = values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(json.dumps(list(shape)).encode() + raw).hexdigest()[:16]


def header_of(facts: Facts | None) -> dict[str, str]:
    """Return the texts of a safetensors header that hold a fingerprint; none for None."""
    return {} if facts is None else {KEY: json.dumps(facts, sort_keys=True)}


def read_fingerprint(header: Mapping[str, str]) -> Facts | None:
    """Return the fingerprint in a safetensors header, which a stranger may have written; None if there is none.

    Raises:
        ValueError: if it is malformed.
    """
    text = header.get(KEY)
    if text is None:
        return None
    if len(text) > _MAX_BYTES:
        raise ValueError(f"takes {len(text)} bytes")
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("is no mapping")
    clean: Facts = {part: dict(facts[part]) for part in ("sizes", "values", "codes")}
    clean["values"] = {name: str(value) for name, value in clean["values"].items()}
    for name, (kind, digest) in clean["codes"].items():
        if kind is not None:
            word, double_quant, block_size = kind
            if type(double_quant) is not bool or block_size not in BLOCK_SIZES:
                raise ValueError(f"{name} has the format {kind}")
            build_format(word, double_quant, block_size)
        clean["codes"][name] = [kind, str(digest)]
    return clean


def agreed(all_facts: Sequence[Facts]) -> Facts:
    """Return what is true of the base of several adapters without `differences`, each in its own format."""
    first, *others = all_facts
    codes = {n: c for n, c in first["codes"].items() if all(other["codes"].get(n) == c for other in others)}
    values = {name: value for facts in reversed(all_facts) for name, value in facts["values"].items()}
    return {"sizes": first["sizes"], "values": values, "codes": codes}


def differences(theirs: Facts, ours: Facts, here: str = "here") -> Iterator[str]:
    """Yield what shows that two fingerprints are of different weights: sizes, and the first tensors that differ.

    ``here`` says where ``ours`` are.
    """
    for name, value in theirs["sizes"].items():
        if name in ours["sizes"] and ours["sizes"][name] != value:
            yield f"{name} {value}, but {ours['sizes'][name]} {here}"
    other = [name for name, value in theirs["values"].items() if _differs(value, ours["values"].get(name))]
    other += [
        name
        for name, (kind, digest) in theirs["codes"].items()
        if kind is not None and ours["codes"].get(name, [None])[0] == kind and ours["codes"][name][1] != digest
    ]
    if other := sorted(dict.fromkeys(other)):
        yield f"other weights in {', '.join(other[:3])}{f' and {len(other) - 3} more' if len(other) > 3 else ''}"


def _differs(theirs: str, ours: str | None) -> bool:
    """Whether two samples of the same dtype differ; of different dtypes, they cannot be compared."""
    return ours is not None and theirs.partition(" ")[0] == ours.partition(" ")[0] and theirs != ours


def formats_of(facts: Facts) -> str:
    """Return the formats of a fingerprint's linears in words."""
    kinds = [None if kind is None else build_format(*kind) for kind, _ in facts["codes"].values()]
    return " and ".join(sorted({"16 or 32 bits" if kind is None else kind.describe() for kind in kinds}))
