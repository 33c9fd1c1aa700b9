"""Safetensors by byte range: maps tensor names to file, offset and shape, and reads any range of elements alone.

Uses plain reads rather than memory maps: a mapped file's pages count as this rank's resident memory, and the bytes
read could not be counted. Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, data).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.conversions import Arrangement, Conversion
from fsdp_qlora.quant.packing import from_bytes

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_BUFFER_DTYPES = _DTYPES | {
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SAMPLES, _SAMPLE_BYTES = 16, 65536
_STEMS = ("model", "diffusion_pytorch_model")
"""How the names of a model's weight files begin, in transformers and in diffusers."""


@dataclass(frozen=True)
class TensorEntry:
    """The location of one tensor in the files."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    num_bytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model as stored: one tensor in the files, or several to concatenate."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]
    make: Callable[[], torch.Tensor] | None = None
    """Converts it from whole tensors in the files, if it is not a plain concatenation."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def file(self) -> Path:
        """File of the first part, for messages."""
        return self.parts[0].file


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of ``folder``, without hidden ones (macOS leaves ``._*`` behind)."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def file_digests(folder: Path) -> dict[str, str]:
    """Return a fingerprint of each of a model's weight files without reading it whole: size and a digest of samples.

    The samples are the header and 16 ranges of 64 KiB spread over the file; the header alone is not enough, because a
    base model and its chat version have equal headers.
    """
    digests: dict[str, str] = {}
    for file in weight_files(folder):
        size, digest = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(length, _MAX_HEADER_BYTES)))
            for part in range(_SAMPLES):
                stream.seek(min(size, 8 + length + (size - 8 - length) * part // _SAMPLES))
                digest.update(stream.read(_SAMPLE_BYTES))
        digests[file.name] = f"{size} bytes, sampled sha256 {digest.hexdigest()[:16]}"
    return digests


class SafetensorsFolder:
    """The tensors in a model folder; ``bytes_read`` counts the bytes read from it."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all safetensors files of ``folder``.

        Raises:
            ModelError: if there are none, one is missing, truncated or damaged, or they differ from the index.
        """
        self.folder, self.bytes_read = folder, 0
        self.entries: dict[str, TensorEntry] = {}
        self.arranged: dict[str, tuple[TensorEntry, ...]] = {}
        """Tensors of the model that are stored under other names or in parts."""
        self.converted: Mapping[str, Conversion] = {}
        """Tensors of the model that upstream's code converts from stored ones."""
        self.drawn: dict[str, torch.Tensor] = {}
        """Tensors of the model that no file holds, with their values."""
        self._same_as: dict[str, str] = {}
        self._last: tuple[Conversion | None, dict[str, torch.Tensor]] = (None, {})
        self.total_bytes = self._tensor_bytes = 0
        names = [(folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json") for stem in _STEMS]
        self._single, self._index = next((pair for pair in names if any(f.is_file() for f in pair)), names[0])
        # if both exist, transformers takes the single file: the index is from an older download
        index = None if self._single.is_file() else self._read_index()
        for file in self._files(index):
            self._read_header(file)
        if index is not None:
            self._compare(index)

    def _read_index(self) -> dict[str, Any] | None:
        file = self._index
        if not file.is_file():
            return None
        try:
            index: dict[str, Any] = json.loads(file.read_text())
            names = set(index["weight_map"].values())
            if outside := [n for n in names if Path(n).name != n]:
                raise ModelError(f"{file} names a file outside its folder: {outside[0]}")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{file} is not a safetensors index: {type(error).__name__}: {error}") from error
        return index

    def _compare(self, index: dict[str, Any]) -> None:
        """Check that the files match the index: each tensor in its file, and the total number of bytes."""
        for name, file in index["weight_map"].items():
            entry = self.entries.get(name)
            if entry is None or entry.file.name != file:
                there = "in no file" if entry is None else f"in {entry.file.name}"
                raise ModelError(
                    f"{self._index}: says that tensor {name} is in {file}, but it is {there}: "
                    "the index and the files are from different downloads."
                )
        stated = (index.get("metadata") or {}).get("total_size")
        if stated is not None and int(stated) != self._tensor_bytes:
            sizes = ", ".join(
                f"{f.name} {f.stat().st_size}" for f in dict.fromkeys(e.file for e in self.entries.values())
            )
            raise ModelError(
                f"{self._index}: says that the tensors take {stated} bytes (metadata.total_size), but the "
                f"files hold {self._tensor_bytes}. The files' sizes: {sizes}. Download the differing files again; if "
                "they are right, correct or remove total_size."
            )

    def _files(self, index: dict[str, Any] | None) -> list[Path]:
        if index is not None:
            names = sorted(set(index["weight_map"].values()))
        elif self._single.is_file():
            names = [self._single.name]
        else:
            names = [file.name for file in weight_files(self.folder)]
            if not names:
                raise ModelError(
                    f"{self.folder} has no *.safetensors file. Pickled weights (.bin) are not read; convert them with "
                    "transformers' save_pretrained."
                )
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{self.folder}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:5])}"
                f"{' ...' if len(missing) > 5 else ''}"
            )
        return [self.folder / name for name in names]

    def _read_header(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{file} is damaged or truncated: its header does not fit into {size} bytes.")
            header = stream.read(length)
        self.bytes_read += 8 + length
        self.total_bytes += size
        try:
            table: dict[str, Any] = json.loads(header)
            table.pop("__metadata__", None)
            for name, info in table.items():
                self._add(file, size, 8 + length, name, info)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{file} is damaged: its header cannot be read ({type(error).__name__}: {error})."
            ) from error

    def _add(self, file: Path, size: int, start: int, name: str, info: dict[str, Any]) -> None:
        begin, end = info["data_offsets"]
        if not 0 <= begin <= end:
            raise ModelError(f"{file} is damaged: its header puts {name} at bytes {begin} to {end}; download it again.")
        if start + end > size:
            raise ModelError(
                f"{file} is truncated: {name} ends at byte {start + end}, but the file has {size}; download it again."
            )
        entry = TensorEntry(name, file, info["dtype"], tuple(info["shape"]), start + begin, end - begin)
        if entry.dtype in _DTYPES and entry.numel * _DTYPES[entry.dtype].itemsize != end - begin:
            raise ModelError(f"{file} is damaged: tensor {name} {entry.shape} {entry.dtype} has {end - begin} bytes.")
        self._tensor_bytes += end - begin
        self.entries[name] = entry

    def arrange(self, arrangement: Arrangement) -> None:
        """Set which stored tensors, concatenated or converted, make up each tensor of the model."""
        self.arranged = {n: tuple(self.entries[p] for p in parts) for n, parts in arrangement.end_to_end.items()}
        self.converted = arrangement.converted

    def has(self, name: str) -> bool:
        """Whether a tensor of the model can be read from the files."""
        return name in self.entries or name in self.arranged or name in self.converted

    def used(self) -> set[str]:
        """Return the names of the stored tensors that are read under other names or converted."""
        converted = {name for conversion in self.converted.values() for name, _ in conversion.parts}
        return converted | {part.name for parts in self.arranged.values() for part in parts}

    def _convert(self, name: str) -> torch.Tensor:
        conversion = self.converted[name]
        # One conversion may produce several tensors; keep the last result so that it runs once for all of them.
        if self._last[0] is not conversion:
            self._last = (conversion, conversion.run(self._read_whole))
        return self._last[1][self._same_as.get(name, name)]

    def _read_whole(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if entry.dtype not in _BUFFER_DTYPES:
            raise ModelError(f"{entry.file}: tensor {name} is {entry.dtype}, which cannot be read.")
        return from_bytes(self.read_bytes(entry, 0, entry.num_bytes), _BUFFER_DTYPES[entry.dtype]).view(entry.shape)

    def alias(self, name: str, other: str) -> None:
        """Make the tensor ``other`` available as ``name`` as well."""
        if other in self.converted:
            self.converted = {**self.converted, name: self.converted[other]}
            self._same_as[name] = other
        else:
            self.arranged[name] = self.arranged.get(other) or (self.entries[other],)

    def looks_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and, in 16 ranges of up to 64 KiB, the same bytes."""
        if one in self.converted or other in self.converted:
            return one in self.converted and self.converted[one] is self.converted.get(other)
        pair = [self.arranged.get(name) or (self.entries[name],) for name in (one, other)]
        if len(pair[0]) != len(pair[1]):
            return False
        for a, b in zip(*pair, strict=True):
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                return False
            for part in range(_SAMPLES):
                start = a.num_bytes * part // _SAMPLES
                stop = min(start + _SAMPLE_BYTES, a.num_bytes)
                if not torch.equal(self.read_bytes(a, start, stop), self.read_bytes(b, start, stop)):
                    return False
        return True

    def read_buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a whole tensor of any supported dtype, in that dtype, on the CPU.

        Raises:
            ModelError: if it has another shape or an unsupported dtype.
        """
        if name in self.converted:
            whole = self._convert(name)
        else:
            (entry,) = self.arranged.get(name) or (self.entries[name],)
            whole = self._read_whole(entry.name)
        if tuple(whole.shape) != shape:
            raise ModelError(f"{self.folder}: tensor {name} is {list(whole.shape)}, but the model needs {list(shape)}.")
        return whole

    def find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Return the location of a tensor, checked against ``shape``.

        Raises:
            ModelError: if it is missing, has another shape, or is not bf16, fp16 or fp32.
        """
        if name in self.converted:
            return self._find_converted(name, shape)
        if (value := self.drawn.get(name)) is not None:
            place = TensorEntry(name, self.folder, "F32", tuple(value.shape), 0, 0)
            return StoredTensor(name, shape, (place,), lambda: value)
        parts = self.arranged.get(name)
        if parts is None and name in self.entries:
            parts = (self.entries[name],)
        if parts is None:
            raise ModelError(f"{self.folder}: no tensor {name} in its {len(self.entries)} tensors.")
        entry = parts[0]
        if (len(parts) == 1 and entry.shape != shape) or sum(part.numel for part in parts) != prod(shape):
            stored = list(entry.shape) if len(parts) == 1 else f"{len(parts)} parts of {list(entry.shape)}"
            raise ModelError(f"{entry.file}: tensor {name} is {stored}, but the model needs {list(shape)}.")
        for part in parts:
            if part.dtype not in _DTYPES:
                raise ModelError(
                    f"{part.file}: tensor {part.name} is {part.dtype}; only {', '.join(_DTYPES)} can be read."
                )
        return StoredTensor(name, shape, parts)

    def _find_converted(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        parts = tuple(self.entries[part] for part, _ in self.converted[name].parts)

        def make() -> torch.Tensor:
            whole = self._convert(name)
            if tuple(whole.shape) != shape:
                raise ModelError(f"{parts[0].file}: {name} is {list(whole.shape)} after conversion, not {list(shape)}.")
            return whole

        return StoredTensor(name, shape, parts, make)

    def read(self, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Return the flat elements ``[start, stop)`` of a tensor, in its own dtype, on the CPU."""
        if tensor.make is not None:
            return tensor.make().reshape(-1)[start:stop]
        pieces, first = [], 0
        for part in tensor.parts:
            low, high = max(start - first, 0), min(stop - first, part.numel)
            if low < high:
                pieces.append(self.read_entry(part, low, high))
            first += part.numel
        if not pieces:
            return torch.empty(0, dtype=_DTYPES[tensor.parts[0].dtype])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_entry(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Return the flat elements ``[start, stop)`` of a stored tensor, in its own dtype, on the CPU."""
        dtype = _DTYPES[entry.dtype]
        return from_bytes(self.read_bytes(entry, start * dtype.itemsize, stop * dtype.itemsize), dtype)

    def read_bytes(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Return the bytes ``[start, stop)`` of a tensor of any dtype as a uint8 vector, on the CPU."""
        data = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            with entry.file.open("rb", buffering=0) as stream:
                stream.seek(entry.offset + start)
                self._read_into(stream, data, entry)
        self.bytes_read += data.numel()
        return data

    @staticmethod
    def _read_into(stream: Any, data: torch.Tensor, entry: TensorEntry) -> None:
        view, done = memoryview(cast(Any, data.numpy())), 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise ModelError(f"{entry.file} ended while reading {entry.name}: it was truncated while in use.")
            done += count
