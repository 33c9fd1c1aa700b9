"""Weights that a checkpoint already holds in bitsandbytes' 4-bit form: their bytes are read as they are.

transformers' ``save_pretrained`` with ``load_in_4bit`` uses the same blocks as our rows (see
`fsdp_qlora.quant.bnb_state`), so each rank reads only its byte ranges of codes and statistics. Anything that would
decode to other numbers (another block size, another map) is refused, and the message names the tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.config.schema import BLOCK_SIZES, QuantSettings
from fsdp_qlora.distributed.shards import HOST
from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.safetensors import SafetensorsFolder, StoredTensor, TensorEntry
from fsdp_qlora.quant.bnb_state import STATE_SUFFIX, nested_quant_map, quant_map
from fsdp_qlora.quant.formats import Format, QuantizedTensor, dequantize, nested_of_rows
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import ROW_BLOCKS, ROW_BYTES, bytes_to_rows, float_to_bits, values_to_rows

_CONFIG_KEYS = ("quantization_config", "compression_config")
_FORMATS = ("nf4", "fp4")
_MAX_STATE_BYTES = 65536
_AGAIN = "quantize the 16-bit model again"


@dataclass(frozen=True)
class PackedWeight:
    """The location of one weight's 4-bit form in the files."""

    codes: TensorEntry
    """Two codes per byte, in any dtype (bitsandbytes' ``quant_storage``): only the bytes matter."""
    absmax: TensorEntry
    """uint8 ``[blocks]`` with double quantization, else float32 ``[blocks]``."""
    nested: TensorEntry | None
    """float32 ``[ceil(blocks / 256)]``; None without double quantization."""
    offset: float
    """Mean of the absmax values; 0 without double quantization."""


def require_readable(folder: Path, settings: QuantSettings) -> None:
    """Check, from config.json alone, that the stored weights can be used with these settings.

    Raises:
        ModelError: if they are quantized by another method, or in another 4-bit format than the settings ask for.
    """
    quantization = quantization_of(folder)
    if quantization is None:
        return
    in_4_bits, in_8_bits = _flag(quantization, 4), _flag(quantization, 8)
    method = str(quantization.get("quant_method") or ("bitsandbytes" if in_4_bits or in_8_bits else "unknown"))
    if method == "bitsandbytes" and in_8_bits:
        method = "bitsandbytes int8"
    if method != "bitsandbytes":
        raise ModelError(
            f"model.name: {folder} is quantized with {method} (quantization_config in its config.json); only "
            "bitsandbytes' 4-bit form can be read. Use the 16-bit model it was made from."
        )
    if in_4_bits:
        name = str(quantization.get("bnb_4bit_quant_type", "fp4"))  # transformers' own default
        _require_format(name, bool(quantization.get("bnb_4bit_use_double_quant")), settings, f"model.name: {folder}")


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the quantization section of config.json, or None if the weights are not quantized.

    Raises:
        ModelError: if config.json or that section is not a JSON object.
    """
    file = folder if folder.is_file() else folder / "config.json"  # a plan may have only the config file
    try:
        config = json.loads(file.read_text())
        inner = config.get("text_config") or {}
        quantization = next((c[k] for c in (config, inner) for k in _CONFIG_KEYS if c.get(k)), None)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} is not a model's configuration: {error}") from error
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(f"{file}: quantization_config is not a JSON object.")
    return quantization


def _flag(quantization: dict[str, Any], bits: int) -> bool:
    return bool(quantization.get(f"load_in_{bits}bit") or quantization.get(f"_load_in_{bits}bit"))


def _require_format(name: str, double_quant: bool, settings: QuantSettings | Format, what: str) -> None:
    wrong = [] if settings.name == name else [f"quant={name}"]
    if wrong or settings.double_quant != double_quant:
        wrong.append(f"quant.double_quant={str(double_quant).lower()}")
    if wrong:
        raise ModelError(
            f"{what} is stored in {_spell(name, double_quant)}, but the settings ask for "
            f"{_spell(settings.name, settings.double_quant)}; set {' '.join(wrong)}."
        )


def _spell(name: str, double_quant: bool) -> str:
    if name in ("none", "int8"):
        return "no quantization" if name == "none" else name
    return f"{name} {'with' if double_quant else 'without'} double quantization"


def packed_format(source: SafetensorsFolder, name: str) -> str | None:
    """Return ``nf4`` or ``fp4`` if the weight ``name`` is stored in that format, else None.

    Raises:
        ModelError: if it is stored in bitsandbytes' int8 form, or has statistics but not exactly one state.
    """
    kinds = [kind for kind in _FORMATS if f"{name}{STATE_SUFFIX}{kind}" in source.entries]
    if f"{name.removesuffix('weight')}SCB" in source.entries:
        raise ModelError(
            f"{source.entries[name].file if name in source.entries else source.folder}: {name} is stored in "
            "bitsandbytes' int8 form, which cannot be read; use the 16-bit model it was made from."
        )
    if len(kinds) == 1:
        return kinds[0]
    if kinds or f"{name}.absmax" in source.entries:
        raise ModelError(f"{source.folder}: {name} has {len(kinds)} of the tensors {name}{STATE_SUFFIX}nf4|fp4, not 1.")
    return None


def find_kept(source: SafetensorsFolder, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Return the location of a tensor that is not quantized.

    Raises:
        ModelError: as `SafetensorsFolder.find`, or if it is stored in 4 bits.
    """
    if kind := packed_format(source, name):
        raise ModelError(
            f"{source.folder}: {name} is stored in {kind}, but this run keeps that tensor unquantized, because of "
            "quant=none, a pattern with none in quant.overrides, quant.embeddings=none, lora.modules_to_save, or "
            "because it is no linear layer that can be quantized. Change that setting, or use a model that holds it "
            "unquantized."
        )
    return source.find(name, shape)


def find_weight(source: SafetensorsFolder, module: QuantMatrices) -> StoredTensor | PackedWeight:
    """Return the location of ``module``'s weight: its 4-bit form if the files hold that, else its float values.

    Raises:
        ModelError: as `SafetensorsFolder.find`; or if its 4-bit form is incomplete or damaged, or its format, blocks
            or maps differ from those of ``module``.
    """
    assert module.stored is not None, "a module made by hand has no place in the files"
    name = module.stored.parameter
    kind = packed_format(source, name)
    if kind is None:
        return source.find(name, module.stored.stored_shape)
    state_entry = _entry(source, f"{name}{STATE_SUFFIX}{kind}", "U8")
    state = _read_state(source, state_entry)
    double_quant = "nested_blocksize" in state or f"{name}.nested_absmax" in source.entries
    _require_format(kind, double_quant, module.quant_format, f"{state_entry.file}: {name}")
    quant_format = module.quant_format
    if (block_size := state.get("blocksize")) in BLOCK_SIZES and block_size != quant_format.block_size:
        raise ModelError(
            f"{state_entry.file}: {name} is stored in blocks of {block_size}, but the settings ask for "
            f"{quant_format.block_size}; set quant.block_size={block_size}."
        )
    shape = list(module.shape)
    _require_state(state, state_entry, {"quant_type": kind, "blocksize": quant_format.block_size, "shape": shape})
    numel = prod(module.shape)
    codes = _entry(source, name, None, (numel + 1) // 2)
    blocks = quant_format.num_statistics(*module.shape)
    _require_map(source, f"{name}.quant_map", quant_map(kind))
    if not double_quant:
        return PackedWeight(codes, _entry(source, f"{name}.absmax", "F32", 4 * blocks), None, 0.0)
    _require_state(state, state_entry, {"nested_blocksize": ROW_BLOCKS, "nested_dtype": "float32"})
    _require_map(source, f"{name}.nested_quant_map", nested_quant_map())
    nested = _entry(source, f"{name}.nested_absmax", "F32", 4 * -(-blocks // ROW_BLOCKS))
    return PackedWeight(codes, _entry(source, f"{name}.absmax", "U8", blocks), nested, _offset(state, state_entry))


def _entry(source: SafetensorsFolder, name: str, dtype: str | None, num_bytes: int | None = None) -> TensorEntry:
    entry = source.entries.get(name)
    if entry is None:
        raise ModelError(f"{source.folder}: no tensor {name}, which this 4-bit weight needs; download the model again.")
    if dtype is not None and entry.dtype != dtype:
        raise ModelError(f"{entry.file}: tensor {name} is {entry.dtype}, not {dtype}; {_AGAIN}.")
    if num_bytes is not None and entry.num_bytes != num_bytes:
        raise ModelError(f"{entry.file}: tensor {name} has {entry.num_bytes} bytes, but its weight needs {num_bytes}.")
    return entry


def _read_state(source: SafetensorsFolder, entry: TensorEntry) -> dict[str, Any]:
    if entry.num_bytes > _MAX_STATE_BYTES:
        raise ModelError(f"{entry.file} is damaged: {entry.name} has {entry.num_bytes} bytes.")
    try:
        state = json.loads(bytes(source.read_bytes(entry, 0, entry.num_bytes).tolist()))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{entry.file} is damaged: {entry.name} is not JSON ({error}).") from error
    if not isinstance(state, dict):
        raise ModelError(f"{entry.file} is damaged: {entry.name} is not a JSON object.")
    return state


def _require_state(state: dict[str, Any], entry: TensorEntry, wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if state.get(key) != value:
            raise ModelError(f"{entry.file}: {entry.name}: {key} is {state.get(key)}, not {value}; {_AGAIN}.")


def _require_map(source: SafetensorsFolder, name: str, ours: torch.Tensor) -> None:
    entry = _entry(source, name, "F32", 4 * ours.numel())
    if not torch.equal(source.read_entry(entry, 0, ours.numel()), ours):
        raise ModelError(f"{entry.file}: tensor {name} holds different values from bitsandbytes' own; {_AGAIN}.")


def _offset(state: dict[str, Any], entry: TensorEntry) -> float:
    value = state.get("nested_offset")
    # `not abs(value) <= max` rather than `>`: rejects NaN as well as values out of range for float32.
    if not isinstance(value, (int, float)) or not abs(value) <= torch.finfo(torch.float32).max:
        raise ModelError(f"{entry.file}: {entry.name}: nested_offset is {value}, not a finite number.")
    return float(value)


@torch.no_grad()
def fill_packed(
    module: QuantMatrices, weight: PackedWeight, source: SafetensorsFolder, rows: tuple[int, int], device: torch.device
) -> None:
    """Read rows ``[rows[0], rows[1])`` of a stored 4-bit weight and write them into ``module``'s local shard.

    Raises:
        ModelError: if a statistic among them is not a finite number.
    """
    module.fill(read_packed(module.quant_format, module.shape, weight, source, rows, device))


def read_packed(
    quant_format: Format, shape: tuple[int, int], weight: PackedWeight, source: SafetensorsFolder,
    rows: tuple[int, int], device: torch.device,
) -> QuantizedTensor:  # fmt: skip
    """Return rows ``[rows[0], rows[1])`` of a stored 4-bit weight ``[out_features, in_features]``.

    Raises:
        ModelError: if a statistic among them is not a finite number.
    """
    first, last = rows
    count = last - first
    codes = source.read_bytes(weight.codes, *_within(first, last, ROW_BYTES, weight.codes.num_bytes))
    columns, together = quant_format.row_statistics, quant_format.nested_rows
    blocks = _within(first, last, columns, quant_format.num_statistics(*shape))
    nested = offset = None
    if weight.nested is None:
        absmax = float_to_bits(_finite(source.read_entry(weight.absmax, *blocks), weight.absmax))
    else:
        absmax = source.read_bytes(weight.absmax, *blocks)
        values = _finite(source.read_entry(weight.nested, first // together, -(-last // together)), weight.nested)
        of_rows = nested_of_rows(quant_format, values, first, last)
        nested = values_to_rows(float_to_bits(of_rows), count, 1).to(device)
        offset = torch.tensor(weight.offset, dtype=torch.float32, device=device)
    return QuantizedTensor(
        bytes_to_rows(codes, count).to(device), values_to_rows(absmax, count, columns).to(device), nested, offset
    )


def read_dequantized(
    module: QuantMatrices, weight: PackedWeight, source: SafetensorsFolder, start: int, stop: int
) -> torch.Tensor:
    """Return the flat elements ``[start, stop)`` of a stored 4-bit weight, dequantized to float32, on the CPU."""
    quant_format, each = module.quant_format, module.quant_format.row_weights(module.in_features)
    first, last = start // each, -(-stop // each)
    packed = read_packed(quant_format, module.shape, weight, source, (first, last), HOST)
    values = dequantize(packed, quant_format, (min(last * each, module.numel) - first * each,), torch.float32)
    return values[start - first * each : stop - first * each]


def _within(first: int, last: int, each: int, total: int) -> tuple[int, int]:
    """Return the range of items for rows ``[first, last)`` of ``each`` items; the last row may be partial."""
    return min(first * each, total), min(last * each, total)


def _finite(values: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"{entry.file}: tensor {entry.name} holds values that are not finite.")
    return values
