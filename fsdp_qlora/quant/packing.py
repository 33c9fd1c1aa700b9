"""Bytes <-> storage dtype and the block-aligned rows; the only place with ``.view(dtype)``.

Packed weights are stored as bfloat16 and statistics as integers because FSDP2 casts *float* parameters to
``MixedPrecisionPolicy.param_dtype`` when it gathers them, and leaves integers alone. Under ``param_dtype=bfloat16`` a
bf16 tensor is gathered bit for bit; float32 statistics would be rounded, so their bits travel as int32. The integers
also make FSDP2 gather a unit as bytes, because its parameters then share no dtype: a gather as bfloat16 would change
NaN patterns on CUDA (`fsdp_qlora.parallel.shard` checks each unit).
"""

from __future__ import annotations

import hashlib

import torch

BLOCK_WEIGHTS = 64
"""Weights that share one absmax, by default."""
ROW_BLOCKS = 256
"""Blocks of 64 in a row; also the size of bitsandbytes' nested block (absmax values per nested absmax)."""
ROW_WEIGHTS = BLOCK_WEIGHTS * ROW_BLOCKS
"""Weights in a row of 4-bit storage."""
ROW_BYTES = ROW_WEIGHTS // 2
"""Bytes of 4-bit codes in a row."""
CHUNK_WEIGHTS = 64 * ROW_WEIGHTS
"""Weights read and quantized at a time: 2 MiB in bf16."""
STORAGE_DTYPE = torch.bfloat16
"""Dtype in which packed bytes are stored."""
ROW_ELEMENTS = ROW_BYTES // STORAGE_DTYPE.itemsize
"""Storage elements in a row: 4,096."""


def num_rows(numel: int) -> int:
    """Return the number of rows of 4-bit storage for ``numel`` weights."""
    return -(-numel // ROW_WEIGHTS)


def bytes_to_rows(data: torch.Tensor, rows: int) -> torch.Tensor:
    """Return ``[rows, 4096]`` bfloat16 holding the uint8 vector ``data``, zero-padded at the end."""
    out = torch.zeros(rows * ROW_BYTES, dtype=torch.uint8, device=data.device)
    out[: data.numel()] = data.reshape(-1)
    return out.view(STORAGE_DTYPE).view(rows, ROW_ELEMENTS)


def rows_to_bytes(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Return the uint8 vector of ``ceil(numel / 2)`` bytes that ``packed`` rows hold (a view)."""
    return packed.reshape(-1).view(torch.uint8)[: (numel + 1) // 2]


def values_to_rows(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return ``[rows, columns]`` of the same dtype holding the vector ``values``, zero-padded at the end."""
    out = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
    out[: values.numel()] = values.reshape(-1)
    return out.view(rows, columns)


def float_to_bits(values: torch.Tensor) -> torch.Tensor:
    """Return the int32 bits of float32 ``values``."""
    return values.contiguous().view(torch.int32)


def bits_to_float(bits: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of int32 ``bits``."""
    return bits.view(torch.float32)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor as a uint8 vector (for hashing and comparing bit by bit)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(raw_bytes(tensor).to("cpu", copy=True).numpy().data).hexdigest()


def from_bytes(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a uint8 vector's bytes as a vector of ``dtype``."""
    return data.view(dtype)
