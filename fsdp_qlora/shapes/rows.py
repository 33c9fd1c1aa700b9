"""How quantized weights are cut into rows that any dim-0 split by FSDP may part. Arithmetic only.

- 4-bit: a weight's flat elements are laid in rows of 16,384 = 64 x 256, the *block-aligned* layout: with blocks of 64,
  a row is one nested quantization block, so a rank can read and quantize just its rows. Longer blocks (up to 4,096)
  divide a row; their nested blocks span several rows, each of which holds the nested statistic itself.
- int8: a row is a row of the matrix. Its statistic is its own (LLM.int8, https://arxiv.org/abs/2208.07339, section 2).

See docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self, cast

FormatName = Literal["nf4", "fp4", "int8"]
BLOCK_WEIGHTS = 64
"""Weights that share one absmax, by default."""
ROW_BLOCKS = 256
"""Blocks of 64 in a row; also bitsandbytes' nested block (absmax values that share one nested absmax)."""
ROW_WEIGHTS = BLOCK_WEIGHTS * ROW_BLOCKS
"""Weights in a row of 4-bit storage."""
ROW_BYTES = ROW_WEIGHTS // 2
"""Bytes of 4-bit codes in a row."""
CHUNK_WEIGHTS = 64 * ROW_WEIGHTS
"""Weights that are read and quantized at a time: 2 MiB in bf16."""


def num_rows(numel: int) -> int:
    """Return the rows of 4-bit storage that ``numel`` weights take."""
    return -(-numel // ROW_WEIGHTS)


def num_blocks(numel: int, block_size: int = BLOCK_WEIGHTS) -> int:
    """Return the number of quantization blocks (absmax values) of ``numel`` weights."""
    return -(-numel // block_size)


@dataclass(frozen=True)
class QuantLayout:
    """A format of quantized weights and what follows from it for their storage."""

    name: FormatName = "nf4"
    double_quant: bool = True
    """Whether the statistics are quantized too (4-bit only)."""
    block_size: int = BLOCK_WEIGHTS
    """Weights that share one statistic (4-bit only)."""
    threshold: float = 0.0
    """Inputs from this magnitude on are multiplied without quantizing their columns (int8 only; 0 = none are)."""

    key: str = field(init=False, default="", repr=False)
    """Name and threshold as one word, which compiled code takes for a constant (it would make the float an input)."""

    def __post_init__(self) -> None:
        if self.name == "int8":
            object.__setattr__(self, "double_quant", False)
            object.__setattr__(self, "block_size", BLOCK_WEIGHTS)
        else:
            object.__setattr__(self, "threshold", 0.0)
        object.__setattr__(self, "key", f"{self.name}>{self.threshold!r}" if self.threshold else self.name)

    @classmethod
    def of_key(cls, key: str, double_quant: bool, block_size: int) -> Self:
        """Return the layout that has this ``key``."""
        name, _, threshold = key.partition(">")
        return cls(cast(FormatName, name), double_quant, block_size, float(threshold or 0))

    @property
    def is_int8(self) -> bool:
        """Whether it is LLM.int8 and not a 4-bit format."""
        return self.name == "int8"

    def num_rows(self, out_features: int, in_features: int) -> int:
        """Return the rows of storage of a matrix."""
        return out_features if self.is_int8 else num_rows(out_features * in_features)

    def row_weights(self, in_features: int) -> int:
        """Return the weights in a row."""
        return in_features if self.is_int8 else ROW_WEIGHTS

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of codes in a row."""
        return in_features if self.is_int8 else ROW_BYTES

    def num_statistics(self, out_features: int, in_features: int) -> int:
        """Return the number of absmax values of a matrix."""
        return out_features if self.is_int8 else num_blocks(out_features * in_features, self.block_size)

    @property
    def row_statistics(self) -> int:
        """Absmax values in a row."""
        return 1 if self.is_int8 else ROW_WEIGHTS // self.block_size

    @property
    def nested_rows(self) -> int:
        """Rows whose statistics are one nested block."""
        return ROW_BLOCKS // self.row_statistics

    @property
    def statistics_bytes(self) -> int:
        """Bytes of statistics of a row: uint8 and one float32, or a float32 each."""
        return self.row_statistics + 4 if self.double_quant else 4 * self.row_statistics


NF4 = QuantLayout()
"""QLoRA's own: 4-bit NormalFloat in blocks of 64 with double quantization."""
