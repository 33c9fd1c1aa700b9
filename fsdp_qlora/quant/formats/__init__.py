"""Formats of quantized weights, a file for each kind. `build_format` makes one by its name, `register` adds another.

format.py    what every format answers: rows and bytes, quantize and dequantize, multiply, look up
blocks4.py   nf4 and fp4: 4-bit codes in blocks of a flattened weight
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
