"""Writes a safetensors file tensor by tensor; the library's own writer takes all tensors at once.

The format: https://github.com/huggingface/safetensors#format. A file begins with the length of its header (8 bytes,
little endian) and the header (JSON: name -> dtype, shape, first and last byte). The tensors follow without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ALIGNED = 8
"""Tensors begin at multiples of this many bytes from the start of the file, if the widest come first."""


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of the file."""

    name: str
    dtype: str
    """As safetensors spells it: ``BF16``."""
    shape: Sequence[int]
    itemsize: int
    """Bytes of a number."""
    num_bytes: int
    write: Callable[[], Iterable[memoryview]]
    """Yields its bytes in order."""


def write_tensors(file: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Write a new safetensors file; its memory is what one tensor yields at a time.

    Raises:
        OSError: if it cannot be written.
        ValueError: if a tensor yields another number of bytes than it stated.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in ordered:
            _write(stream, tensor)


def _write(stream: BinaryIO, tensor: TensorToWrite) -> None:
    written = 0
    for piece in tensor.write():
        written += piece.nbytes
        stream.write(piece)
    if written != tensor.num_bytes:
        raise ValueError(f"{tensor.name}: {written} bytes were to be written, not {tensor.num_bytes}.")
