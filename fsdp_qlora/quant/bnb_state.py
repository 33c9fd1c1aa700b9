"""A 4-bit tensor in the form that bitsandbytes and transformers store: codes, statistics, maps and a JSON state.

``NAME.weight`` holds the codes as uint8 ``[ceil(numel / 2), 1]``. Next to it are ``NAME.weight.absmax``, ``.quant_map``
and, with double quantization, ``.nested_absmax`` and ``.nested_quant_map``. The rest is JSON, stored as the bytes of
``.quant_state.bitsandbytes__nf4`` (or ``fp4``).
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

from fsdp_qlora.quant.formats import Format, QuantizedTensor
from fsdp_qlora.quant.packing import ROW_BLOCKS, bits_to_float, rows_to_bytes

STATE_SUFFIX = ".quant_state.bitsandbytes__"
"""The name of a weight's JSON state is the weight's name, this suffix, and the format."""


@cache
def quant_map(name: str) -> torch.Tensor:
    """Return the 16 values that nf4 or fp4 codes decode to, float32 on the CPU."""
    return get_4bit_type(name, device="cpu")


@cache
def nested_quant_map() -> torch.Tensor:
    """Return the 256 values that the codes of quantized statistics decode to, float32 on the CPU."""
    return create_dynamic_map()


def bnb_tensors(
    name: str, quantized: QuantizedTensor, quant_format: Format, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors that transformers stores for one 4-bit weight, by name, on the CPU.

    Args:
        name: name of the weight, such as ``model.layers.0.self_attn.q_proj.weight``.
        quantized: all rows of the quantized weight.
        quant_format: its format.
        shape: shape of the weight.
        dtype: dtype of the weight before quantization; bitsandbytes dequantizes to it.
    """
    numel = prod(shape)
    absmax = quantized.absmax.reshape(-1)[: quant_format.num_statistics(1, numel)].cpu()
    offset = inner = None
    if quantized.nested is not None and quantized.offset is not None:
        nested = bits_to_float(quantized.nested).reshape(-1)[:: quant_format.nested_rows].cpu()
        inner = QuantState(absmax=nested, blocksize=ROW_BLOCKS, code=nested_quant_map(), dtype=torch.float32)
        offset = quantized.offset.cpu()
    else:
        absmax = bits_to_float(absmax)
    state = QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=quant_map(quant_format.name),
        blocksize=quant_format.block_size,
        quant_type=quant_format.name,
        dtype=dtype,
        offset=offset,
        state2=inner,
    )
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    # Clone: weights share the maps and the rows are padded, but safetensors wants tensors with storage of their own.
    return {
        key: value.clone()
        for key, value in {name: rows_to_bytes(quantized.packed, numel).cpu()[:, None], **parts}.items()
    }
