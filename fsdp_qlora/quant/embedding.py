"""`QuantEmbedding`: a quantized embedding table; only the rows that are looked up are dequantized."""

from __future__ import annotations

import torch

from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.formats import QuantFormat, QuantizedTensor, dequantize, dequantize_codes
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import bits_to_float, rows_to_bytes
from fsdp_qlora.shapes.rows import ROW_WEIGHTS


class QuantEmbedding(QuantMatrices):
    """A frozen table ``[num_embeddings, embedding_dim]`` in ``quant_format``.

    Shapes: int64 ``[...]`` -> ``[..., embedding_dim]`` in ``dtype``, times ``scale`` (Gemma scales its embeddings).
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, quant_format: QuantFormat, dtype: torch.dtype,
        scale: float = 1.0, device: torch.device | str = "meta",
    ) -> None:  # fmt: skip
        if not quant_format.is_int8 and embedding_dim % quant_format.block_size:
            raise PlanError(
                f"quant.embeddings: the hidden size {embedding_dim} is no multiple of {quant_format.block_size}, so "
                "the rows of the embedding share blocks. Set quant.embeddings=none, or int8."
            )
        super().__init__(embedding_dim, num_embeddings, quant_format, device=device)
        self.dtype, self.scale = dtype, scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of the token ids ``input``."""
        ids = input.reshape(-1)
        if self.quant_format.is_int8:
            found = QuantizedTensor(self.packed[ids], self.absmax[ids], None, None)
            rows = dequantize(found, self.quant_format, (*input.shape, self.in_features), self.dtype)
        else:
            rows = self._rows_4bit(ids).view(*input.shape, self.in_features)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def _rows_4bit(self, ids: torch.Tensor) -> torch.Tensor:
        width = self.in_features
        codes = rows_to_bytes(self.packed, self.numel).view(-1, width // 2)[ids]
        absmax = self._absmax(ids, width // self.quant_format.block_size)
        return dequantize_codes(
            codes.reshape(-1), absmax.reshape(-1), self.quant_format, (ids.numel(), width), self.dtype
        )

    def _absmax(self, ids: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return the float32 statistics ``[ids, blocks]`` of the rows ``ids``."""
        places = ids[:, None] * blocks + torch.arange(blocks, device=ids.device)
        coded = self.absmax.reshape(-1)[places]
        if self.nested is None:
            return bits_to_float(coded)
        assert self.offset is not None
        nested = bits_to_float(self.nested).reshape(-1)[places * self.quant_format.block_size // ROW_WEIGHTS]
        return self.quant_format.code(ids.device)[coded.long()] * nested + self.offset[0]  # type: ignore[index]
