"""Weights that are drawn where they are used and written nowhere: a folder whose weight file is a header alone.

`write_header` gives a model folder a safetensors file with a true header and a hole in place of the data, which takes
no room on the disk. `DrawnWeights` reads that header as always, and draws elements where it would read them: on the
device, in blocks of `BLOCK` elements, each from a seed made of the tensor's name and the block's number. So any number
of ranks sees the same values, however it cuts a tensor. A GPU and a CPU draw different ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from fsdp_qlora.distributed.process import device_types
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.load.safetensors import SafetensorsFolder, TensorEntry
from fsdp_qlora.quant.packing import raw_bytes

BLOCK = 2**20
"""Elements that are drawn at once."""
STD = 0.02
"""Of what is drawn, as models of this kind are initialized; norms' weights are drawn around 1."""


def write_header(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write ``model.safetensors`` for bf16 tensors of these shapes by name: a header, and a hole of the data's size."""
    table, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


class DrawnWeights(SafetensorsFolder):
    """A folder made by `write_header`; ``bytes_read`` counts what was drawn for this rank, and the header."""

    def __init__(self, folder: Path) -> None:
        """Read the header; draw on the current accelerator, or on the CPU if there is none."""
        super().__init__(folder)
        if any(entry.dtype != "BF16" for entry in self.entries.values()):
            raise ValueError(f"{folder}: only bf16 can be drawn")
        self.device = torch.device(next(iter(device_types())))
        self._generator = torch.Generator(self.device)
        self._kept: tuple[tuple[str, int], torch.Tensor] | None = None

    def read_entry(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Return the flat elements ``[start, stop)`` of a tensor, bf16, on the device."""
        pieces = [
            self._block(entry, number)[max(0, start - number * BLOCK) : stop - number * BLOCK]
            for number in range(start // BLOCK, -(-stop // BLOCK))
        ]
        self.bytes_read += 2 * (stop - start)
        if not pieces:
            return torch.empty(0, dtype=torch.bfloat16, device=self.device)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_bytes(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Return the bytes ``[start, stop)`` of a tensor as a uint8 vector, on the CPU."""
        first = start // 2
        return raw_bytes(self.read_entry(entry, first, -(-stop // 2)))[start - 2 * first : stop - 2 * first].cpu()

    def whole(self, name: str) -> torch.Tensor:
        """Return a whole tensor, bf16, on the device."""
        entry = self.entries[name]
        return self.read_entry(entry, 0, entry.numel).view(entry.shape)

    def _block(self, entry: TensorEntry, number: int) -> torch.Tensor:
        """Draw a block, unless it is the last one drawn: ranges that follow each other meet in the middle of one."""
        key = entry.name, number
        if self._kept is None or self._kept[0] != key:
            size = min(BLOCK, entry.numel - number * BLOCK)
            values = torch.empty(size, dtype=torch.bfloat16, device=self.device)
            values.normal_(std=STD, generator=self._generator.manual_seed(seed_of(entry.name, number)))
            if len(entry.shape) == 1 and entry.name.endswith("norm.weight"):
                values += 1
            self._kept = key, values
        return self._kept[1]


def write_drawn(source: DrawnWeights, folder: Path, file_bytes: int = 2**31) -> None:
    """Write all tensors into ``folder`` (in memory: /dev/shm), for peers that load from files and nothing else."""
    from safetensors.torch import save_file

    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in source.entries.items():
        if groups[-1] and size + entry.num_bytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += entry.num_bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: source.whole(name).cpu() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(e.num_bytes for e in source.entries.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_memory() -> str | None:
    """Return the folder of files that lie in memory, or None if this machine has none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
