"""Formats of quantized weights, one file per kind. `build_format` builds one by name, `register` adds another.

format.py    the interface of a format: rows and bytes, quantize and dequantize, multiply, look up
blocks4.py   nf4 and fp4: 4-bit codes in blocks of the flattened weight
int8.py      LLM.int8: the rows of a matrix in 8 bits
"""

from fsdp_qlora.quant.formats.blocks4 import FP4, NF4
from fsdp_qlora.quant.formats.format import (
    Format,
    Packed,
    QuantizedTensor,
    build_format,
    dequantize,
    format_of_key,
    nested_of_rows,
    one_thread,
    quantize,
    register,
    to_rows,
)
from fsdp_qlora.quant.formats.int8 import Int8

__all__ = [
    "FP4",
    "NF4",
    "Format",
    "Int8",
    "Packed",
    "QuantizedTensor",
    "build_format",
    "dequantize",
    "format_of_key",
    "nested_of_rows",
    "one_thread",
    "quantize",
    "register",
    "to_rows",
]
