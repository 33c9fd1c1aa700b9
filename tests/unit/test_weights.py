"""The folder reader: what is wrong with a model's files is named, and exactly the bytes asked for are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.safetensors import SafetensorsFolder
from tests import tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory) -> Path:
    """A model in several files with an index."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="200KB")


@pytest.fixture
def folder(sharded_model, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_model, tmp_path / "model"))


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _index(folder: Path, **changes) -> None:
    file = folder / INDEX
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _header(file: Path, change) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    change(table)
    header = json.dumps(table).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def _drop(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def _cut(folder: Path, count: int) -> None:
    part = _parts(folder)[1]
    part.write_bytes(part.read_bytes()[:-count])


def _weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def _first_entry(table: dict) -> dict:
    return next(entry for name, entry in table.items() if name != "__metadata__")


NORM = "model.norm.weight"
DAMAGE = {
    "a file is missing": (lambda f: _parts(f)[0].unlink(), "1 of {count} weight files are missing: {first}"),
    "a file is cut by a byte": (lambda f: _cut(f, 1), "{second} is truncated"),
    "a file is empty": (lambda f: _parts(f)[1].write_bytes(b""), "{second} is damaged or truncated"),
    "header of another format": (lambda f: _parts(f)[1].write_bytes(b"PK\3\4" * 50), "{second} is damaged or truncated"),
    "header is no JSON": (
        lambda f: _parts(f)[1].write_bytes((4).to_bytes(8, "little") + b"oops"), "{second} is damaged: its header"),
    "header without offsets": (
        lambda f: _header(_parts(f)[1], lambda t: _first_entry(t).pop("data_offsets")), "{second} is damaged"),
    "a range that ends before it begins": (
        lambda f: _header(_parts(f)[1], lambda t: _first_entry(t).update(data_offsets=[8, 4])),
        "{second} is damaged: its header puts .* at bytes 8 to 4;"),
    "a range before the data": (
        lambda f: _header(_parts(f)[1], lambda t: _first_entry(t).update(data_offsets=[-4, 4])),
        "{second} is damaged: its header puts .* at bytes -4 to 4;"),
    "header is a list": (
        lambda f: _parts(f)[1].write_bytes((2).to_bytes(8, "little") + b"[]"), "{second} is damaged"),
    "bytes that do not fit the shape": (
        lambda f: _header(_parts(f)[1], lambda t: _first_entry(t)["shape"].append(2)), "{second} is damaged: tensor"),
    "a tensor is not in its file": (
        lambda f: _drop(f / _weight_map(f)[NORM], NORM), "tensor model.norm.weight is in {norm}, but it is in no file"),
    "a tensor is in another file": (
        lambda f: _index(f, weight_map=_weight_map(f) | {NORM: _parts(f)[0].name}), f"{NORM} is in {{first}}, but it is in"),
    "total size differs": (
        lambda f: _index(f, metadata={"total_size": 123456}), "the tensors take 123456 bytes .* {second} [0-9]+"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), "is not a safetensors index"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "is not a safetensors index"),
    "index that climbs": (lambda f: _index(f, weight_map={NORM: "../x.safetensors"}), "outside its folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(folder, case):
    damage, message = DAMAGE[case]
    names = [part.name for part in _parts(folder)]
    expected = message.format(count=len(names), first=names[0], second=names[1], norm=_weight_map(folder)[NORM])
    damage(folder)
    with pytest.raises(ModelError, match=expected):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("metadata", [None, {}, {"total_parameters": 1}])
def test_an_index_need_not_state_the_size(folder, metadata):
    _index(folder, metadata=metadata)
    assert NORM in SafetensorsFolder(folder).entries


def test_of_two_sets_of_files_the_one_that_transformers_reads_is_read(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    save_file({"other": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert "other" not in SafetensorsFolder(folder).entries


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("model.norm.weight", (64,), r"model.norm.weight is \[128\], but the model needs \[64\]"),
    ("model.nrm.weight", (128,), "no tensor model.nrm.weight"),
])  # fmt: skip
def test_a_tensor_that_the_model_does_not_fit_is_named(sharded_model, name, shape, message):
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(sharded_model).find(name, shape)


def test_a_dtype_that_cannot_be_read_is_named(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="tensor a is I8; only BF16, F16, F32"):
        SafetensorsFolder(tmp_path).find("a", (4,))


def test_a_file_cut_while_in_use(folder):
    source = SafetensorsFolder(folder)
    entry = max((e for e in source.entries.values() if e.file == _parts(folder)[1]), key=lambda e: e.offset)
    _cut(folder, 2)
    with pytest.raises(ModelError, match=f"ended while reading {entry.name}"):
        source.read_entry(entry, 0, entry.numel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_run_of_elements(tmp_path, dtype):
    whole = torch.arange(600).to(dtype).view(20, 30)
    save_file({"a": torch.zeros(7), "b": whole}, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    entry, before = source.find("b", (20, 30)), source.bytes_read
    for start, stop in ((0, 600), (17, 18), (599, 600), (5, 5), (600, 600)):
        assert torch.equal(source.read(entry, start, stop), whole.view(-1)[start:stop])
    assert source.bytes_read - before == (600 + 1 + 1) * dtype.itemsize
