"""A 4-bit tensor in the form that bitsandbytes and transformers store: codes, statistics, maps and a JSON state.

``NAME.weight`` holds the codes as uint8 ``[ceil(numel / 2), 1]``; beside it lie ``.absmax``, ``.quant_map`` and, with
double quantization, ``.nested_absmax`` and ``.nested_quant_map``; all else is JSON in the bytes of
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
"""What comes between a weight's name and its format in the name of its JSON state."""


@cache
def quant_map(name: str) -> torch.Tensor:
    """Return the 16 values that the codes of nf4 or fp4 stand for, float32 on the CPU."""
    return get_4bit_type(name, device="cpu")


@cache
def nested_quant_map() -> torch.Tensor:
    """Return the 256 values that the codes of quantized statistics stand for, float32 on the CPU."""
    return create_dynamic_map()


def bnb_tensors(
    name: str, quantized: QuantizedTensor, quant_format: Format, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return what transformers stores of one 4-bit weight, by tensor name, on the CPU.

    Args:
        name: of the weight, such as ``model.layers.0.self_attn.q_proj.weight``.
        quantized: all rows of it.
        quant_format: its format.
        shape: of the weight.
        dtype: of the weight before it was quantized; bitsandbytes dequantizes to it.
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
    # Copies: the maps are one tensor for all weights and the rows have padding; a file holds each tensor by itself.
    return {
        key: value.clone()
        for key, value in {name: rows_to_bytes(quantized.packed, numel).cpu()[:, None], **parts}.items()
    }
