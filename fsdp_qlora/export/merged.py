"""Writes the base model with an adapter folded into its weights, in 16 bits, file by file and tensor by tensor.

The new folder has the files, the order of names and the tensors of the base's own, so whatever reads the base reads the
result. A linear, or a stack of experts, is read whole, folded in float32 by PEFT's code (`adapters/fold.py`) and
rounded once; tensors that nothing changes are copied as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer

from fsdp_qlora.errors import StorageError
from fsdp_qlora.export.folding import Folding
from fsdp_qlora.export.model_folder import (
    MERGE,
    beside_the_weights,
    keep_template,
    new_folder,
    of_tokenizer,
    put,
    require_free,
)
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.files.tensors import TensorToWrite, write_tensors
from fsdp_qlora.files.write import copy_regular, write_json
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.safetensors import SafetensorsFolder, TensorEntry
from fsdp_qlora.load.stored import packed_format
from fsdp_qlora.model.config import GENERATION, load_generation_config

PIECE_BYTES = 64 * 2**20
"""Unchanged tensors are copied in pieces of this size."""
_SPELT = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_DTYPES = {spelt: dtype for dtype, spelt in _SPELT.items()}
_OF_QUANTIZATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Merged:
    """Summary of a merge."""

    folded: int
    """Number of linears with an adapter."""
    stacks: int
    """Number of stacked weights of experts with an adapter."""
    num_bytes: int
    """Bytes of all tensors."""


@torch.no_grad()
def export_merged(
    folding: Folding, source: Path, target: Path, progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> Merged:  # fmt: skip
    """Write the folded model into ``target``. Call it in one process.

    Args:
        folding: what is folded.
        source: the base model's folder.
        target: a folder that does not exist yet or is empty; with ``overwrite``, one that
            holds an earlier merge. It is replaced as a whole.
        progress: called with (tensors done, total tensors).
        overwrite: whether ``target`` may hold an earlier export.

    Raises:
        ModelError: if ``target`` is not empty, a tensor cannot be folded, a result does not fit its dtype, or
            transformers cannot read the base's generation_config.json.
        SecurityError: if a file in ``source`` links outside it: it would be shared along with the model.
        StorageError: if ``target`` cannot be written.
    """
    adapter = folding.adapter
    require_free(target, MERGE, overwrite, (source, adapter.folder))
    beside = {**beside_the_weights(source), **of_tokenizer(adapter.folder)}
    for file in {entry.file for entry in folding.files.entries.values()}:
        own_file(source, file.name)
    load_generation_config(source)  # what cannot be read would come along
    with new_folder(target, partial(put, overwrite=overwrite)) as staging:
        home, total = _write_weights(folding, staging, progress)
        for name, file in beside.items():
            copy_regular(file, staging / name)
        keep_template(staging, adapter.folder)
        write_json(staging / "config.json", _config(source, folding))
        _follow_end_of_turn(staging, folding)
        folded = sorted([*adapter.modules, *adapter.stacks, *adapter.whole_parameters])
        write_json(staging / MERGE.mark, {"folded": folded})
        _check(staging, home)
    return Merged(len(adapter.modules), len(adapter.stacks), total)


def _write_weights(
    folding: Folding, folder: Path, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, tuple[str, str]], int]:
    """Write all files; return tensor -> its file and dtype, and the bytes of all tensors."""
    files = folding.files
    statistics = [f"{name}." for name in folding.places if packed_format(files, name)]
    kept = [e for e in files.entries.values() if not any(e.name.startswith(start) for start in statistics)]
    by_file: dict[Path, list[TensorEntry]] = {}
    for entry in sorted(kept, key=lambda entry: (str(entry.file), entry.offset)):
        by_file.setdefault(entry.file, []).append(entry)
    home: dict[str, tuple[str, str]] = {}
    done = total = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(kept))

    for file, entries in by_file.items():
        tensors = [_tensor(folding, entry, count) for entry in entries]
        write_tensors(folder / file.name, tensors, {"format": "pt"})
        home |= {tensor.name: (file.name, tensor.dtype) for tensor in tensors}
        total += sum(tensor.num_bytes for tensor in tensors)
    if (files.folder / "model.safetensors.index.json").is_file() or len(by_file) > 1:
        weight_map = {name: file for name, (file, _) in sorted(home.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return home, total


def _tensor(folding: Folding, entry: TensorEntry, count: Callable[[], None]) -> TensorToWrite:
    """Return how to write one tensor of the result."""
    shape = folding.shape(entry)
    dtype = _dtype(folding, entry)
    if dtype is None:
        itemsize = entry.num_bytes // entry.numel if entry.numel else 1

        def write() -> Iterator[memoryview]:
            for start in range(0, entry.num_bytes, PIECE_BYTES):
                piece = folding.files.read_bytes(entry, start, min(start + PIECE_BYTES, entry.num_bytes))
                yield memoryview(cast(Any, piece.numpy()))
            count()

        return TensorToWrite(entry.name, entry.dtype, shape, itemsize, entry.num_bytes, write)

    def write_changed() -> Iterator[memoryview]:
        if entry.name in folding.places:
            values = folding.values(entry)
        else:
            values = folding.files.read_entry(entry, 0, entry.numel)
        rounded = values.to(dtype).contiguous()
        require_finite(rounded, f"what=merged: {entry.name} in {entry.dtype}, folded and rounded to {_SPELT[dtype]},")
        if rounded.numel():
            yield memoryview(cast(Any, rounded.view(torch.uint8).numpy()))
        count()

    numel = torch.Size(shape).numel()
    return TensorToWrite(entry.name, _SPELT[dtype], shape, dtype.itemsize, numel * dtype.itemsize, write_changed)


def _dtype(folding: Folding, entry: TensorEntry) -> torch.dtype | None:
    """Return the dtype in which a tensor is written; None if its bytes are copied.

    What is stored in 16 bits keeps its dtype, and what upstream keeps in float32. Others take the base's.
    """
    stored = _DTYPES.get(entry.dtype)
    changed = entry.name in folding.places
    if stored in (torch.bfloat16, torch.float16):
        return stored if changed else None
    if changed:
        return folding.base.dtype
    in_model = folding.dtypes.get(entry.name, torch.float32)
    narrowed = stored is torch.float32 and in_model != torch.float32
    return folding.base.dtype if narrowed else None


def _config(source: Path, folding: Folding) -> dict[str, Any]:
    """Return the base's config.json, unquantized, with the vocabulary of the result."""
    config = read_json(own_file(source, "config.json"), dict[str, Any])
    word = str(folding.base.dtype).removeprefix("torch.")
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for key in _OF_QUANTIZATION:
            part.pop(key, None)
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = word if part[key] == "float32" else part[key]
        if folding.num_ids is not None and "vocab_size" in part:
            part["vocab_size"] = folding.num_ids
    return config


def _follow_end_of_turn(folder: Path, folding: Folding) -> None:
    """Let generation stop at an added end of turn, which the adapter's tokenizer names as its ``eos_token``."""
    if folding.num_ids is None:
        return
    end = AutoTokenizer.from_pretrained(folder, local_files_only=True).eos_token_id
    if end not in folding.adapter.config.token_ids:
        return
    file = folder / GENERATION
    config = read_json(file, dict[str, Any]) if file.is_file() else {}
    before = config.get("eos_token_id", folding.base.config.get_text_config().eos_token_id)
    others = before if isinstance(before, list) else [] if before is None else [before]
    write_json(file, config | {"eos_token_id": [end, *(other for other in others if other != end)]})


def _check(folder: Path, home: Mapping[str, tuple[str, str]]) -> None:
    """Read the files' headers back and compare them with what was written."""
    entries: Iterable[TensorEntry] = SafetensorsFolder(folder).entries.values()
    if {entry.name: (entry.file.name, entry.dtype) for entry in entries} != home:
        raise StorageError(f"{folder} does not hold the tensors that were written.")
