"""Writes the base model in bitsandbytes' 4-bit form, as ``save_pretrained`` would, but tensor by tensor.

Later starts read it instead of quantizing, and transformers can load it as it is. Memory never holds more than the
tensors of one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

from fsdp_qlora.errors import ModelError, StorageError
from fsdp_qlora.export.model_folder import BASE, Kind, beside_the_weights, new_folder, put, require_free
from fsdp_qlora.files.read import own_file, read_json
from fsdp_qlora.files.write import copy_regular, open_as_a_new_file, write_json
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.safetensors import SafetensorsFolder, weight_files
from fsdp_qlora.load.stored import find_kept, packed_format, quantization_of
from fsdp_qlora.load.weights import LowRank, minus
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.quant.bnb_state import bnb_tensors
from fsdp_qlora.quant.formats import Format, one_thread, quantize
from fsdp_qlora.shapes.linears import LinearShape, ModelShapes, quantized_linears

FILE_BYTES = 2_000_000_000
"""Bytes of tensors per safetensors file; also the most that the export holds in memory."""
Taken = Callable[[str], LowRank | None]
"""Returns what is taken off the weight of a linear, by its name."""


@dataclass(frozen=True)
class ExportedBase:
    """Summary of an export."""

    quantized: int
    """Number of linears stored in 4 bits."""
    num_bytes: int
    """Bytes of all tensors."""


@torch.no_grad()
def export_base(
    base: PreTrainedModel,
    source: Path,
    target: Path,
    quant_format: Format,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    file_bytes: int = FILE_BYTES,
    taken: Taken = lambda _: None,
    complete: Callable[[Path], object] = lambda _: None,
    always_index: bool = False,
    kind: Kind = BASE,
    overwrite: bool = False,
) -> ExportedBase:
    """Quantize the model in the folder ``source`` into the new folder ``target``. Call it in one process.

    Args:
        base: the model on meta; its dtype becomes transformers' compute dtype.
        source: folder with config.json and 16-bit or 32-bit safetensors.
        target: a folder that does not exist yet or is empty (but see ``overwrite``). It is written atomically.
        quant_format: format of the linears inside the decoder layers.
        device: where to quantize.
        progress: called with (tensors done, total tensors).
        file_bytes: size at which a new safetensors file is started.
        taken: returns what is taken off the weight of the linear of this name before it is quantized.
        complete: called with the finished folder before it becomes ``target``, to write what else belongs into it.
        always_index: whether to write an index even of a single file, for readers that would take every safetensors
            file in the folder for one of the model's (vLLM's ``filter_duplicate_safetensors_files``).
        kind: what ``target`` will be.
        overwrite: whether ``target`` may hold an earlier export of this kind, which is replaced as a whole.

    Raises:
        ModelError: if ``target`` is not empty, or a tensor of ``source`` is missing, not finite or already 4-bit.
        SecurityError: if a file in ``source`` links outside it: it would be shared along with the model.
        StorageError: if ``target`` cannot be written.
    """
    require_free(target, kind, overwrite, (source,))
    if quantization_of(source) is not None:
        raise ModelError(f"model.name: {source} is already quantized; use the 16-bit model it was made from.")
    copied = beside_the_weights(source)
    for file in weight_files(source):
        own_file(source, file.name)
    shapes, files = read_shapes(base), SafetensorsFolder(source)
    with new_folder(target, partial(put, overwrite=overwrite)) as staging:
        shards = _Shards(staging, file_bytes, always_index)
        for tensors in _stored(shapes, files, quant_format, device, progress, taken):
            shards.add(tensors)
        shards.finish()
        for name, file in copied.items():
            copy_regular(file, staging / name)
        _write_config(base, source, staging, quant_format, shapes)
        _check(staging, shards.home)
        if kind is BASE:
            write_json(staging / BASE.mark, {"quantized": sorted(x.name for x in written_in_4_bits(shapes))})
        complete(staging)
    return ExportedBase(len(written_in_4_bits(shapes)), shards.total)


def written_in_4_bits(shapes: ModelShapes) -> list[LinearShape]:
    """Return the linears to write in 4 bits. bitsandbytes has no format for stacked experts, so they are left out."""
    return [x for x in quantized_linears(shapes) if not x.stacked]


def _stored(
    shapes: ModelShapes,
    files: SafetensorsFolder,
    quant_format: Format,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
    taken: Taken,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors to store for each tensor of the source, by name, in file order."""
    linears = {x.parameter: x for x in written_in_4_bits(shapes)}
    for name, linear in linears.items():
        find_kept(files, name, linear.stored_shape)
    entries = sorted(files.entries.values(), key=lambda e: (str(e.file), e.offset))
    for done, entry in enumerate(entries):
        if packed_format(files, entry.name):
            raise ModelError(f"{entry.file}: {entry.name} is already in 4 bits; use the 16-bit model.")
        if entry.name in linears:
            weight = files.read_entry(entry, 0, entry.numel).view(entry.shape)
            require_finite(weight, f"{entry.file}: tensor {entry.name}")
            weight = weight.t().contiguous() if linears[entry.name].transposed else weight
            values = weight.to(device)
            if (product := taken(linears[entry.name].name)) is not None:
                with one_thread():  # as in training
                    values = minus(values.float(), product.on(device))
            quantized = quantize(values, quant_format)
            yield bnb_tensors(entry.name, quantized, quant_format, tuple(weight.shape), weight.dtype)
        else:
            with safe_open(entry.file, framework="pt") as stream:  # reopened each time: mapped pages stay resident
                kept = stream.get_tensor(entry.name)
            require_finite(kept, f"{entry.file}: tensor {entry.name}")
            yield {entry.name: kept.clone()}
        if progress:
            progress(done + 1, len(entries))


@dataclass
class _Shards:
    """Collects tensors into safetensors files; `finish` gives them the names that transformers expects."""

    folder: Path
    limit: int
    always_index: bool = False
    total: int = 0
    home: dict[str, str] = field(default_factory=dict)
    """Tensor -> file."""
    _files: list[list[str]] = field(default_factory=list)
    _held: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add the tensors of one weight, which stay in one file."""
        if self._held and _size(self._held) + _size(tensors) > self.limit:
            self._write()
        self._held |= tensors

    def _write(self) -> None:
        self._files.append(list(self._held))
        self.total += _size(self._held)
        file = self.folder / f"part-{len(self._files)}"
        save_file(self._held, file, metadata={"format": "pt"})
        open_as_a_new_file(file)
        self._held = {}

    def finish(self) -> None:
        """Write the remaining tensors, name the files, and write an index if there are several or it is asked for."""
        self._write()
        count = len(self._files)
        for number, names in enumerate(self._files, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / name)
            self.home |= dict.fromkeys(names, name)
        if count > 1 or self.always_index:
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(self.home.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _write_config(base: PreTrainedModel, source: Path, folder: Path, quant_format: Format, shapes: ModelShapes) -> None:
    """Write config.json, including how the weights are quantized."""
    ours = {x.name for x in written_in_4_bits(shapes)}
    outside = [x.name for x in shapes.linears if x.name not in ours]
    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_format.name,
        bnb_4bit_use_double_quant=quant_format.double_quant,
        bnb_4bit_compute_dtype=base.dtype,
        llm_int8_skip_modules=[shapes.head, *outside] if outside else None,  # None is its default: all but the head
    )
    config = read_json(own_file(source, "config.json"), dict[str, Any])
    write_json(folder / "config.json", config | {"quantization_config": stored.to_dict()})


def _check(folder: Path, home: dict[str, str]) -> None:
    """Read the files' headers back and compare them with what was written."""
    stored = {name: entry.file.name for name, entry in SafetensorsFolder(folder).entries.items()}
    if stored != home:
        raise StorageError(f"{folder} does not hold the tensors that were written.")
